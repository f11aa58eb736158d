"""The table of all commands, in the order in which `minitp --help` lists them."""

from minitp.cli.bench import BenchCommand
from minitp.cli.bits import BitsCommand
from minitp.cli.chat import ChatCommand
from minitp.cli.check import CheckCommand
from minitp.cli.compare import CompareCommand
from minitp.cli.generate import GenerateCommand
from minitp.cli.info import InfoCommand
from minitp.cli.judge import JudgeCommand
from minitp.cli.lint import LintCommand
from minitp.cli.logprobs import LogprobsCommand
from minitp.cli.perplexity import PerplexityCommand
from minitp.cli.plan import PlanCommand
from minitp.cli.ranks import RanksCommand
from minitp.cli.serve import ServeCommand
from minitp.cli.shard import ShardCommand
from minitp.cli.tour import TourCommand
from minitp.cli.trace import TraceCommand

SECTIONS = {
    "run a model": (GenerateCommand(), ChatCommand(), ServeCommand()),
    "check and compare": (
        CheckCommand(),
        JudgeCommand(),
        LintCommand(),
        TraceCommand(),
        CompareCommand(),
        BitsCommand(),
        PerplexityCommand(),
        LogprobsCommand(),
    ),
    "plan and measure": (ShardCommand(), PlanCommand(), BenchCommand()),
    "learn and report": (TourCommand(), InfoCommand()),
}
INTERNAL = (RanksCommand(),)
COMMANDS = {command.name: command for section in (*SECTIONS.values(), INTERNAL) for command in section}
