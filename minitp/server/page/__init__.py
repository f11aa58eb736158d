"""The chat page, which is served as one file: style.css and the scripts are inserted into page.html.

markdown.js  turns a text into elements
server.js    requests to the server, and its state
ranks.js     the ranks, and the examples of messages in an empty conversation
answer.js    an answer while it arrives, and copying
chat.js      the conversation
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
