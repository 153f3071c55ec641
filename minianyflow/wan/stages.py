"""The three stages of distillation, one per run: teacher tuning, forward flow-map training, on-policy distillation.

A stage is a function (config, networks, null) -> {role: Role}. It makes the same calls as notebooks 4 and 5 of the
course; only the networks are larger. `distil` trains the stage that a configuration names.
"""

from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss
from minianyflow.training import Role
from minianyflow.wan.prefetch import prefetch
from minianyflow.wan.run import (
    Clock,
    Networks,
    draws,
    forward_loss,
    guard,
    guided_teacher,
    optimiser,
    prepare,
    sampler,
    save_run,
    simulation,
)
from minianyflow.wan.trainer import train_run


def teacher(config, networks, null):
    """Flow matching: rows r = t alone."""
    student = networks.trained("student", config.student)
    return {"student": Role(student, forward_loss(config, networks, null), **optimiser(config))}


forward = teacher  # with rows r < t, and the objective of the configuration, it is the forward stage


def on_policy(config, networks, null):
    """Backward simulation, distribution matching against a fake score, and the forward loss beside."""
    student = networks.trained("student", config.student)
    fake = networks.trained("fake", config.teacher)
    policy = OnPolicyLoss(
        guided_teacher(config, networks, null),
        fake,
        forward_loss(config, networks, null),
        config.on_policy.forward_weight,
        config.shift,
        simulation(config),
    )
    fake_loss = FakeScoreLoss(student, config.shift, simulation(config))
    return {
        "student": Role(student, policy, **optimiser(config)),
        "fake": Role(fake, fake_loss, **optimiser(config, lr=config.on_policy.fake_lr, ema=None)),
    }


STAGES = {"teacher": teacher, "forward": forward, "on_policy": on_policy}


def distil(config):
    """Train the stage of `config`, from the newest checkpoint of its run if there is one; returns run.json.

    Leaves a run folder. On other processes than the main one: None. Raises `guard.Preempted` after SIGTERM.
    """
    accelerator, data, checkpoints = prepare(config)
    networks = Networks(config, data.shape[0], accelerator.device)
    null = {"prompt": data.null.to(accelerator.device)}
    roles = STAGES[config.stage](config, networks, null)
    clock, watch, waits = Clock(), guard(config, data), []
    checkpoints.stateful = {"networks": networks, "clock": clock, "guard": watch}
    history = train_run(
        roles,
        prefetch(draws(config, data, (accelerator.process_index, accelerator.num_processes)), config.steps, waits),
        config.steps,
        config.accumulate,
        accelerator,
        {"desc": f"{config.architecture} {config.stage}"},
        sampler(config, data, roles["student"], accelerator),
        config.log.every,
        checkpoints,
        watch,
        own_rows=True,
    )
    return save_run(config, data, networks, roles, history, clock.seconds, accelerator, waits)
