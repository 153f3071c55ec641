"""minianyflow: any-step generation, from two dimensions to Wan2.1, through one function u(z, t, r).

Time: t = 1 is noise, t = 0 is data. `u(z, t, r)` is the average velocity from t down to r; z_r = z - (t - r) u.

The rooms, from the ground up; each needs only those above it in this list:
    errors, install                               one line for bad input; the set-up
    interpolant, schedules, flow_map, samplers    the mathematics
    mixtures                                      exact truth
    pairs, guidance, objectives                   the forward stage
    consistency                                   the baseline
    on_policy                                     backward simulation, distribution matching
    networks, faults, training                    a small network, what may go wrong in a long run, the one loop
    measures, pictures                            how far off, and what it looks like
    checkpoints                                   what training goes on from
    running, demo, ablation                       jobs side by side, the race, what moves it
    exposure                                      exposure bias, where it is exact
    codec, wan, causal, teacher_forcing           video: the codec, transformers of diffusers as u, chunk by chunk
    shards                                        captioned latents on disk
    weights, pipelines                            how networks are kept; out to diffusers
    roles                                         one frozen base, three roles: LoRA adapters
    video_measures, video_pictures                what a blob video should be, and what it looks like
    video_stages, video_report                    every stage of training, and what each reaches at any step count
    config, wan_folders, wan_shapes, movies       Wan2.1: what a run is told, weights and parts, sizes, videos as files
    clips, prepare                                captioned videos to shards of latents
    runs, exports, sources                        what a run trains and leaves, out to diffusers, what can be sampled
    gpus, costs, questions, prices                what an evaluation costs, and who is asked for one
    plan, plan_report                             what a run takes, before anything is rented
    course, exercises, __main__                   what notebooks stand on, their exercises, the command line
"""

__version__ = "0.1.0"
