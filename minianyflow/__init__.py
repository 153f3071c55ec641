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
    measures, palette, pictures                   how far off, and what it looks like
    students                                      trained networks of the plane, samplers by name
    running, demo, ablation                       jobs side by side, the race, what moves it
    checkpoints                                   what training goes on from
    peers                                         flow maps beside velocity models of other libraries
    exposure                                      exposure bias, where it is exact
    backbones                                     any transformer of diffusers as u(z, t, r)
    codec, wan, causal, teacher_forcing           video: the codec, transformers of diffusers as u, chunk by chunk
    shards                                        captioned latents on disk
    blocks                                        transformers' blocks, with less copied on the way
    weights, pipelines                            how networks are kept; out to diffusers
    roles                                         one frozen base, three roles: LoRA adapters
    video_measures, video_pictures                what a blob video should be, and what it looks like
    video_stages, video_report                    every stage of training, and what each reaches at any step count
    player, stills, scene                         the player of trajectories, its pictures, controls around it
    plane_scenes, clip_scenes, scenes             the five scenes of the course, one line each
    config, wan_folders, wan_shapes, movies       Wan2.1: what a run is told, weights and parts, sizes, videos as files
    clips, prepare                                captioned videos to shards of latents
    runs, exports, sources                        what a run trains and leaves, out to diffusers, what can be sampled
    vbench_worker, vbench_scores                  VBench, in the Python that has it
    sampled, evaluation                           what sources have sampled, and what more steps buy
    gpus, costs, questions, prices                what an evaluation costs, and who is asked for one
    plan, plan_report                             what a run takes, before anything is rented
    gpu_check                                     a GPU against the plan: step time, rate, memory
    browser, live, offline, bench_live            around the scenes: a browser, the app, offline pages, how quick
    course, exercises, __main__                   what notebooks stand on, their exercises, the command line
"""

__version__ = "0.1.0"
