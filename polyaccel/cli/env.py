"""`polyaccel env`: what a bug report needs to say about this machine."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `env`."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(options: argparse.Namespace) -> int:
    """Print versions, engines, settings and telling environment variables; secrets are hidden."""
    import json

    from polyaccel.config.resolve import config_file, gather, inherited_environment
    from polyaccel.redaction import Redaction
    from polyaccel.registry import backend_names, load_backend
    from polyaccel.tracking.surroundings import describe

    environment = inherited_environment()
    redaction = Redaction(environment)
    facts = describe(environment, redaction)
    for name in ("command", "directory", "git"):
        del facts[name]  # of this command, not of the run that failed
    engines = {}
    for name in backend_names():
        probe = load_backend(name).probe()
        engines[name] = f"version {probe.version}" if probe.is_usable else f"not usable: {probe.reason} ({probe.cure})"
    gathered = gather(environment)
    facts["engines"] = engines
    facts["configuration_file"] = str(config_file(environment) or "none")
    settings = {name: f"{value} ({gathered.sources[name]})" for name, value in gathered.values.items()}
    facts["settings"] = redaction.tree(settings)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if not isinstance(value, dict):
            print(f"{name}: {value}")
            continue
        print(f"{name}:{'' if value else ' none'}")
        for key, item in value.items():
            print(f"  {key}: {item}")
    return 0
