"""The entry point of `python -m minitp`, which is the `minitp` command."""

import sys

from minitp.cli.main import main

sys.exit(main())
