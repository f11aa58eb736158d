"""The config.json files in transformers_configs.json: with every default, as transformers writes them."""

import json

from paths import SUPPORT

KNOWN = json.loads((SUPPORT / "transformers_configs.json").read_text(encoding="utf-8"))
WRITTEN = {  # (version of transformers, family) -> fields
    (version, family): {**families["shared"], **fields}
    for version, families in KNOWN["defaults"].items()
    for family, fields in families.items()
    if family != "shared"
}
LAST = max(KNOWN["defaults"])
NEWEST = {family: fields for (version, family), fields in WRITTEN.items() if version == LAST}
