"""The chat page: one file that needs no other, because style.css and the scripts are inserted into page.html.

The scripts: markdown.js turns a text into elements, server.js sends the requests, ranks.js shows the ranks
and the examples of messages, answer.js shows an answer while it arrives, chat.js holds the conversation.
"""

from importlib.resources import files

# The scripts, in the order in which they run.
SCRIPTS = ("markdown.js", "server.js", "ranks.js", "answer.js", "chat.js")


def render():
    """Return the page as text."""
    scripts = "\n".join(map(_part, SCRIPTS))
    return _part("page.html").replace("@@style@@", _part("style.css")).replace("@@script@@", scripts)


def _part(name):
    return files(__package__).joinpath(name).read_text("utf-8")
