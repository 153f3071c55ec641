"""The commands of small video: weights (train every stage), video (measure). Each takes argv and returns a status."""

from minianyflow.support.cli import experiment_parser, whole_numbers


def weights(argv: list[str]) -> int:
    """Train the video codec, teacher and students, an hour; says how they compare with those in toy_data/video."""
    arguments = experiment_parser(weights, "outputs/weights").parse_args(argv)
    from minianyflow.video.report import comparison
    from minianyflow.video.stages import train_all

    train_all(arguments.output, arguments.workers, arguments.quiet)
    print(comparison(arguments.output, arguments.workers, arguments.quiet))
    return 0


def video(argv: list[str]) -> int:
    """Measure the trained video students at 1 to 128 steps, 45 minutes; writes any_step.json, motion.json, pictures."""
    parser = experiment_parser(video, "outputs/video")
    parser.add_argument("--weights", default=None, help="folder of the trained networks (None: toy_data/video)")
    parser.add_argument("--nfe", default="1,2,4,8,16,32,64,128", type=whole_numbers, help="step counts; fewer: faster")
    parser.add_argument("--motion", action="store_true", help="write motion.json alone: five minutes")
    arguments = parser.parse_args(argv)
    from minianyflow.video import motion_report, report

    folder = arguments.weights or report.WEIGHTS
    if not arguments.motion:
        figures = report.run(folder, arguments.output, None, arguments.nfe, arguments.workers, arguments.quiet)
        print(f"\n{report.table(figures)}\n")
    motion_report.run(folder, arguments.output, arguments.workers)
    pictures = "" if arguments.motion else "any_step.json, any_step.png, from_ideal.png, contact_sheet.png, "
    print(f"written to {arguments.output}: {pictures}motion.json")
    return 0
