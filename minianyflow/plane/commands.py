"""The commands of the plane: demo (the race) and exposure. Each takes argv and returns an exit status."""

from dataclasses import replace
from pathlib import Path

from minianyflow.support.cli import experiment_parser


def demo(argv: list[str]) -> int:
    """Race every method against the exact answer; writes any_step.json and any_step.png."""
    options = race_options(demo, argv, "outputs/demo")
    from minianyflow.plane.race import run, table

    report = run(**options)
    print(f"\n{report['dataset']}, in units {report['units']}; the truth: {report['flow']}\n\n{table(report)}")
    print(f"\n{table(report, 'path_error')}")
    print(f"\nwritten: {options['output']}/any_step.json, {options['output']}/any_step.png")
    return 0


def exposure(argv: list[str]) -> int:
    """Exposure bias on the circle process, where it is exact, ten minutes; writes exposure.json and exposure.png."""
    options = vars(experiment_parser(exposure, "outputs/exposure", seeds="0,1,2").parse_args(argv))
    from minianyflow.plane.exposure import run

    run(**options)
    print(f"\nwritten: {options['output']}/exposure.json, {options['output']}/exposure.png")
    return 0


def race_options(command, argv: list[str], output: str, evaluations: int = 6_000_000) -> dict:
    """The arguments of `race.run` from those of a command."""
    parser = experiment_parser(command, output, seeds="0,1,2")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--dataset", default="spiral", help="spiral, ring8, checkerboard, rings, skewed_ring")
    target.add_argument("--data", type=Path, metavar="FILE", help="your own: a CSV file of points, or a picture")
    spent = f"that training takes per method and seed (default: {evaluations:,})"
    parser.add_argument("--evaluations", type=int, default=evaluations, help=spent)
    options = vars(parser.parse_args(argv))
    options["dataset"] = options.pop("data") or options["dataset"]
    from minianyflow.plane.race import BUDGET

    return options | {"budget": replace(BUDGET, evaluations=options.pop("evaluations"))}
