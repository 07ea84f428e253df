"""`distill pin`: hold what the params read of the Hub at a commit."""

import argparse

HELP = "show which Hub inputs of params.yaml are pinned and which have moved, or pin them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "inputs",
        metavar="PARAM",
        nargs="*",
        help="pin these, or move their pins: label.teacher, or all of a section; none shows all",
    )
    parser.add_argument("--all", action="store_true", help="pin all")
    parser.add_argument("--params", metavar="FILE", default="params.yaml", help="in place of params.yaml")


def run(args: argparse.Namespace) -> None:
    """Show how the params stand to the Hub, or write the commits of now and show what changed."""
    from distill_app.pins import find_pins, write_pins

    if args.all and args.inputs:
        raise ValueError("pin: found --all and names, expected one of both; leave out the names")
    pins = find_pins(args.params, args.inputs)
    if not pins:
        print(f"{args.params} names nothing of the Hub")
    if not args.all and not args.inputs:
        for pin in pins:
            print(f"{pin.input.name}: {pin.input.repo}: {pin.state()}")
        return
    write_pins(args.params, pins)
    for pin in pins:
        print(
            f"{pin.input.name}: {pin.input.repo}: pinned at {pin.commit}, was {pin.input.revision or 'null'}"
        )
