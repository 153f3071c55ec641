"""minianyflow: any-step generation, from two dimensions to Wan2.1, through one function u(z, t, r).

Time: t = 1 is noise, t = 0 is data. `u(z, t, r)` is the average velocity from t down to r; z_r = z - (t - r) u.

The files beside this one are the mathematics. The folders follow the journey:
    networks/   functions u(z, t, r): an MLP, small video transformers, Wan2.1
    plane/      the race of methods on two-dimensional targets, exposure bias on the circle
    video/      small video latents: training stages, measures, report
    wan/        distillation of Wan2.1 at full size
    planner/    memory, hours and money of a run, before it starts
    live/       the player of trajectories and the five scenes of the course
    course/     what notebooks and exercises stand on
    support/    error messages, files that appear whole or not at all, worker processes
"""

__version__ = "0.1.0"
