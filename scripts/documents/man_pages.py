"""The manual pages in docs/man/, made from the commands and the configuration's models.

python -m scripts.documents.man_pages            list the pages that are out of date
python -m scripts.documents.man_pages --write    bring docs/man/ up to date
"""

from __future__ import annotations

import inspect
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import click

from migrated.cli import daemon, migratectl
from migrated.cli.options import ParameterCommand, parameter_options
from migrated.cli.session import DEFAULT_SOCKET, EXIT_FAILED, EXIT_IN_DOUBT, EXIT_INTERRUPTED, EXIT_UNREACHABLE
from scripts.basics import ROOT
from scripts.documents.configuration import default, field_texts, kind, meaning, models
from scripts.documents.roff import bold, escape, example, marked, paragraphs, roff, tagged

DIRECTORY: Final = ROOT / "docs" / "man"
VERSION: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
EXIT_USAGE: Final = 2


def page(name: str, section: int, about: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole page; the sections are roff."""
    head = [
        f'.\\" Made by {Path(__file__).relative_to(ROOT)}; do not edit.',
        f'.TH "{escape(name.upper())}" {section} "" "migrated {VERSION}" "Live migration"',
        ".SH NAME",
        f"{escape(name)} \\- {escape(about)}",
    ]
    body = [line for title, text in sections for line in (f".SH {title}", text)]
    return "\n".join([*head, ".nh", *body]) + "\n"


# --- commands ---------------------------------------------------------------------------------------------------------


def leaves(group: click.Group, words: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command below a group, in the order of its definition, and its name with the group's words before it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{words}{name} ")
        else:
            yield f"{words}{name}", command


def parameters_of(command: click.Command) -> list[click.Parameter]:
    """The arguments and options of a command, those that all commands have included."""
    return command.get_params(click.Context(command, **command.context_settings))


def usage(words: str, command: click.Command) -> str:
    """How a command is written, in roff."""
    pieces = [bold(words), "[OPTION...]"]
    for parameter in parameters_of(command):
        if isinstance(parameter, click.Argument):
            text = parameter.metavar or (parameter.name or "").upper()
            if isinstance(parameter.type, click.Choice):
                text = "|".join(parameter.type.choices)
            pieces.append(escape(text if parameter.required or text.startswith("[") else f"[{text}]"))
    return " ".join(pieces)


def option_text(option: click.Option) -> str:
    """An option with its names, its value and its meaning. Said here, as click words it anew from time to time."""
    names = ", ".join(bold(name) for name in [*option.opts, *option.secondary_opts])
    values = "|".join(option.type.choices) if isinstance(option.type, click.Choice) else option.type.name.upper()
    tag = names if option.is_flag else f"{names} {escape(option.metavar or values)}"
    text = option.help or ""
    if isinstance(option.type, click.IntRange):
        text += f" From {option.type.min}{'' if option.type.max is None else f' to {option.type.max}'}."
    return tagged(tag, text + (" Required." if option.required else ""))


def options(command: click.Command, leave_out: frozenset[str] = frozenset()) -> str:
    """The options of a command."""
    found = [one for one in parameters_of(command) if isinstance(one, click.Option) and one.opts[-1] not in leave_out]
    return "\n".join(option_text(one) for one in found)


def command_sections(group: click.Group) -> str:
    """A subsection for each command: how it is written, what it does, its options."""
    common = frozenset({"--json", "--socket", "--help"})
    shared = frozenset(f"--{off}{name}" for name in parameter_options() for off in ("", "no-"))
    found = []
    for words, command in leaves(group):
        takes_parameters = isinstance(command, ParameterCommand)
        text = [f".SS {usage(words, command)}", paragraphs(command.help or "")]
        text.append(options(command, common | shared if takes_parameters else common))
        if takes_parameters:
            text += [".PP", roff("It takes every migration parameter as an option: see MIGRATION PARAMETERS.")]
        found.append("\n".join(part for part in text if part))
    return "\n".join(found)


def parameter_section() -> str:
    """The migration parameters as options."""
    model = models()["migration"]
    texts = field_texts(model)
    switch = {"`true`": "`on`", "`false`": "`off`", "`true`, `false`": "`on`, `off`"}
    lines = [
        roff(
            "Options of `migrate` and `estimate`, and without the dashes keys of `set`. What is not given is what "
            "`set` said for the guest, and else what the configuration of the daemon says; the defaults here are its "
            "defaults."
        )
    ]
    for name, option in parameter_options().items():
        key = option.parameter.field
        field = model.model_fields[key]
        values, preset = (switch.get(text, text.replace('"', "")) for text in (kind(key, field), default(key, field)))
        off = f", `--no-{name}`" if option.parameter.argument.type == "boolean" else ""
        lines.append(tagged(setting(f"`--{name}`{off}", values, preset), meaning("migration", key, texts)))
    return "\n".join(lines)


def setting(name: str, values: str, preset: str) -> str:
    """The tag of something that can be set: its `name`, what it takes, and its default."""
    return f"{marked(name)} ({marked(values)}; {'not set' if preset == '–' else f'default {marked(preset)}'})"


STATUSES: Final = {
    0: "Done.",
    EXIT_FAILED: "It failed: aborted, refused, cancelled, damaged. The reason is on standard error, and in the "
    "document with `--json`.",
    EXIT_USAGE: "Wrong usage.",
    EXIT_UNREACHABLE: "No daemon answers at the control socket.",
    EXIT_IN_DOUBT: "In doubt: COMMIT was sent and nobody answered. See `resolve`.",
    EXIT_INTERRUPTED: "Interrupted. A migration that was waited for goes on.",
}


def statuses(meanings: dict[int, str]) -> str:
    """Exit statuses and their meanings."""
    return "\n".join(tagged(str(status), text) for status, text in meanings.items())


def migratectl_page() -> str:
    """migratectl(1)."""
    group = migratectl.main
    synopsis = f"{bold('migratectl')} [OPTION...] COMMAND [ARGUMENT...]"
    return page(
        "migratectl",
        1,
        "migrate running guests and see where the downtime went",
        [
            ("SYNOPSIS", synopsis),
            (
                "DESCRIPTION",
                f"{paragraphs(group.help or '')}\n.PP\n"
                + roff(
                    "It talks to the `migrated` of this host over its control socket. A migration id may be cut to its "
                    "first characters as long as they are unique."
                ),
            ),
            (
                "OPTIONS",
                f"{roff('They may stand behind the command, too.')}\n{options(group)}",
            ),
            ("COMMANDS", command_sections(group)),
            ("MIGRATION PARAMETERS", parameter_section()),
            ("EXIT STATUS", statuses(STATUSES)),
            (
                "ENVIRONMENT",
                tagged(bold("MIGRATED_SOCKET"), "The control socket, unless `--socket` names one.")
                + "\n"
                + tagged(bold("NO_COLOR"), "Show no colours."),
            ),
            ("FILES", tagged(bold(DEFAULT_SOCKET), "The control socket of a daemon of the system.")),
            (
                "EXAMPLES",
                example(
                    "migratectl guest create web --memory 1GiB --workload hot-cold",
                    "migratectl migrate web tcp:192.0.2.8:4460 --downtime-limit 100ms",
                    "migratectl --json history --guest web --last 1",
                    "migratectl report 7abdb8 -o web.html",
                    'eval "$(migratectl completion bash)"',
                ),
            ),
            ("SEE ALSO", r"\fBmigrated\fR(8), \fBmigrated.toml\fR(5)"),
        ],
    )


def migrated_page() -> str:
    """migrated(8)."""
    group = daemon.main
    return page(
        "migrated",
        8,
        "live migration daemon with an enforced downtime budget",
        [
            (
                "SYNOPSIS",
                "\n.br\n".join(f"{bold('migrated')} {usage(words, command)}" for words, command in leaves(group)),
            ),
            (
                "DESCRIPTION",
                f"{paragraphs(group.help or '')}\n.PP\n"
                + roff(
                    "It stays in the foreground and logs to standard error unless `[log] file` is set. It is ready "
                    "when it logs `ready`; the control socket answers from then on. Guests are processes of their own: "
                    "they outlive the daemon, and the next one finds them again."
                ),
            ),
            ("OPTIONS", options(group)),
            ("COMMANDS", command_sections(group)),
            (
                "SIGNALS",
                "\n".join(
                    [
                        tagged(
                            "\\fBSIGTERM\\fR, \\fBSIGINT\\fR",
                            "Stop in order: running migrations are cancelled, their guests run on. A second one does "
                            "not wait.",
                        ),
                        tagged(
                            "\\fBSIGHUP\\fR",
                            "Read the configuration again. `[migration]` and `level` of `[log]` count at once, running "
                            "migrations keep what they began with, and the log names the sections that need a restart.",
                        ),
                    ]
                ),
            ),
            (
                "ENVIRONMENT",
                "\n".join(
                    [
                        tagged(
                            bold("MIGRATED_SECTION__KEY"),
                            "Overrides a key of the configuration: `MIGRATED_LOG__LEVEL=debug`.",
                        ),
                        tagged(
                            "\\fBNOTIFY_SOCKET\\fR, \\fBWATCHDOG_USEC\\fR",
                            "Set by the service manager (`Type=notify`): the daemon says when it is ready, reloads and "
                            "stops, and feeds the watchdog from its event loop.",
                        ),
                        tagged(
                            "\\fBLISTEN_FDS\\fR, \\fBLISTEN_PID\\fR",
                            "Set by the service manager for socket activation: migrations arrive at the one TCP socket "
                            "that it passes, and `[listen] address` does not count.",
                        ),
                    ]
                ),
            ),
            (
                "EXIT STATUS",
                statuses(
                    {
                        0: "It was stopped, or the configuration has no problems.",
                        1: "It could not start; the reason is on standard error.",
                        daemon.EXIT_BAD_CONFIG: "Wrong usage, or a configuration with problems.",
                        130: "A second signal came while it stopped.",
                    }
                ),
            ),
            ("FILES", files()),
            ("SEE ALSO", r"\fBmigratectl\fR(1), \fBmigrated.toml\fR(5), \fBsystemd.socket\fR(5)"),
        ],
    )


def files() -> str:
    """Where a daemon keeps what, by the defaults of the configuration."""
    config = {name: field.default for name, field in models()["state"].model_fields.items()}
    state = config["directory"]
    guests = models()["vmm"].model_fields["directory"].default
    socket = models()["control"].model_fields["socket"].default
    found = {
        f"{socket}": "The control socket: QMP, mode 0660.",
        f"{state}/journal": "Decisions about who may run a guest. Never delete it while an attempt is open.",
        f"{state}/history.sqlite": "Records of past attempts.",
        f"{state}/knowledge.json": "What predictions learned.",
        f"{state}/resume-costs.json": "How long resumes took, which is reserved from the downtime limit.",
        f"{guests}": "API sockets, logs and run logs of guests.",
    }
    return "\n".join(tagged(bold(path), text) for path, text in found.items())


def configuration_page() -> str:
    """migrated.toml(5)."""
    sections = []
    for name, model in models().items():
        texts = field_texts(model)
        about = inspect.cleandoc(model.__doc__ or "").partition(": ")[2] if name != "migration" else ""
        about = about or "Defaults of every migration that starts here; `migratectl migrate` and `set` override them."
        lines = [f".SS {bold(f'[{name}]')}", roff(f"{about[:1].upper()}{about[1:]}")]
        for key, field in model.model_fields.items():
            lines.append(tagged(setting(f"`{key}`", kind(key, field), default(key, field)), meaning(name, key, texts)))
        sections.append("\n".join(lines))
    return page(
        "migrated.toml",
        5,
        "configuration of migrated",
        [
            (
                "DESCRIPTION",
                paragraphs(
                    """
                    A TOML file that `migrated` is given with `--config`. `migrated check-config FILE` names every
                    problem of one with file, key and reason; a key that does not exist is an error.

                    `MIGRATED_SECTION__KEY` in the environment overrides the file, and the file the defaults.

                    Sizes take `KiB`, `MiB`, `GiB` and `TiB`, rates a size with `/s`, durations `us`, `ms` and `s`, in
                    quotes: `"64MiB"`, `"100MiB/s"`, `"250ms"`. A number without quotes is in the unit that ends the
                    key's name. Paths count from the working directory of the daemon; `~` is the home directory of its
                    user.
                    """
                ),
            ),
            ("SECTIONS", "\n".join(sections)),
            (
                "EXAMPLES",
                example(
                    "[listen]",
                    'address = "192.0.2.7:4460"',
                    "",
                    "[migration]",
                    'downtime_limit_ms = "100ms"',
                ),
            ),
            ("SEE ALSO", r"\fBmigrated\fR(8), \fBmigratectl\fR(1)"),
        ],
    )


PAGES: Final[dict[str, Callable[[], str]]] = {
    "migratectl.1": migratectl_page,
    "migrated.8": migrated_page,
    "migrated.toml.5": configuration_page,
}


def main() -> int:
    """List what is out of date, or bring it up to date."""
    stale = 0
    for name, made in PAGES.items():
        path, text = DIRECTORY / name, made()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(name)
        if "--write" in sys.argv[1:]:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 0 if "--write" in sys.argv[1:] else min(stale, 1)


if __name__ == "__main__":
    sys.exit(main())
