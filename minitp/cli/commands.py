"""The table of all commands, in the order in which `minitp --help` lists them."""

from minitp.cli.bench import Bench
from minitp.cli.chat import Chat
from minitp.cli.check import Check
from minitp.cli.compare import Compare
from minitp.cli.generate import Generate
from minitp.cli.info import Info
from minitp.cli.perplexity import Perplexity
from minitp.cli.plan import Plan
from minitp.cli.ranks import Ranks
from minitp.cli.serve import Serve
from minitp.cli.shard import Shard
from minitp.cli.tour import Tour
from minitp.cli.trace import Trace

SECTIONS = {
    "run a model": (Generate(), Chat(), Serve()),
    "check and compare": (Check(), Trace(), Compare(), Perplexity()),
    "plan and measure": (Shard(), Plan(), Bench()),
    "learn and report": (Tour(), Info()),
}
INTERNAL = (Ranks(),)
COMMANDS = {command.name: command for section in (*SECTIONS.values(), INTERNAL) for command in section}
