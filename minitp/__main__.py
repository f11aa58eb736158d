"""`python -m minitp` is the `minitp` command."""

import sys

from minitp.cli import main

sys.exit(main())
