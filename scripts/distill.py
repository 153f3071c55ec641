"""Distil Wan2.1, one stage a run: teacher tuning, forward flow-map training, or on-policy with backward simulation.

    python scripts/distill.py --config wan-1.3b causal forward [key=value ...]

On several GPUs: accelerate launch --config_file FILE scripts/distill.py, with a file of scripts/accelerate.
SIGTERM saves after the step under way and exits with 143; the same command then goes on from there.
The functions below make the same calls as notebooks 4 and 5 of the course; only the networks are larger.
"""

import sys

from minianyflow.support.cli import Parser, run


def teacher(config, networks, null):
    """Flow matching: rows r = t alone."""
    from minianyflow.training import Role
    from minianyflow.wan.run import forward_loss, optimiser

    student = networks.trained("student", config.student)
    return {"student": Role(student, forward_loss(config, networks, null), **optimiser(config))}


forward = teacher  # with rows r < t, and the objective of the configuration, it is the forward stage


def on_policy(config, networks, null):
    """Backward simulation, distribution matching against a fake score, and the forward loss beside."""
    from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss
    from minianyflow.training import Role
    from minianyflow.wan.run import forward_loss, guided_teacher, optimiser, simulation

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
    """Train the stage of `config`, from where it was broken off, and leave a run folder; returns run.json."""
    from minianyflow.wan.prefetch import prefetch
    from minianyflow.wan.run import Clock, Networks, draws, guard, prepare, sampler, save_run
    from minianyflow.wan.trainer import train_run

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


def main(argv=None):
    """Parse, print or train, say what was written; returns the exit status."""
    from accelerate import PartialState

    from minianyflow.wan.config import as_yaml, load_config
    from minianyflow.wan.guard import EXIT_SIGTERM, Preempted

    parser = Parser("distill.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="FILE",
        help="overlays of minianyflow/wan/configs in order: model, architecture, stage; or paths of your own",
    )
    parser.add_argument("--print-config", action="store_true", help="show every option as it stands, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of configs/base.yaml")
    arguments = parser.parse_args(argv)
    files = [each for each in arguments.config if "=" not in each]
    pairs = [each for each in arguments.config if "=" in each]  # those that follow --config
    config = load_config(files, [*pairs, *arguments.overrides])
    if arguments.print_config:
        print(as_yaml(config), end="")
        return 0
    try:
        made = distil(config)
    except Preempted as stopped:
        if PartialState().is_main_process:
            print(f"\n{stopped}; the same command goes on from there", file=sys.stderr)
        return EXIT_SIGTERM
    if made:  # on the main process
        print(f"\nwritten: {config.output}, after {made['seconds']} seconds")
        if waited := made["waiting_for_data"]:
            print(f"waiting for data: {waited['median']:.2%} of a step (median), {waited['all']:.2%} of all")
        for role, each in made["evaluations_a_sample"].items():
            print(f"{role:10} {each['forwards']:6.2f} forwards and {each['backwards']:.2f} backwards a sample")
    return 0


if __name__ == "__main__":
    status = run(main)
    if status == 143:  # then torch is there
        from minianyflow.wan.guard import exit_at_once

        exit_at_once()
    sys.exit(status)
