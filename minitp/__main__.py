"""`python -m minitp` is the `minitp` command."""

import sys

from minitp.cli.main import main

sys.exit(main())
