"""Draw check-map.png and check-map-dark.png: a check of the demo model in which one rank has one fault.

`python docs/images/make_check_map.py` runs `minitp check` on four ranks. In layer 11, rank 2 caches zeros
instead of the key of each decoded token. The pictures are the upper part of the report, without the numbers
of the selected step, as a headless Chromium shows it. Pillow comes with matplotlib.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from minitp.cli.main import main
from minitp.kv_cache import KVCache
from minitp.util.environment import env_rank

RANK, LAYER = 2, 11
COMMAND = ["check", "The capital of France is", "--tp", "4"]
WIDTH, HEIGHT, SCALE = 840, 1400, 2  # CSS pixels of the picture at most, and device pixels for each
MARGIN = 16  # CSS pixels below the map
STYLE = f"""<style>
  header, main {{ max-width: {WIDTH}px; margin: 0; padding: 0 20px; }} header {{ padding-top: 18px; }}
  .buttons, #run, #modes, #side, #growth-section, #plan-section, footer {{ display: none !important; }}
  section {{ margin-top: 14px !important; }}
  .legend {{ gap: 6px 12px; }} .scale {{ margin-right: 34px; }}
  #board {{ grid-template-columns: 1fr 190px; }}
  #map table {{ --row: 14px !important; }}
</style>"""
BROWSER = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
BROWSER += ["--run-all-compositor-stages-before-draw", "--virtual-time-budget=8000"]
DARK = "--blink-settings=preferredColorScheme=0"


def spoil_the_cache():
    """Make the rank with the fault write zeros for the key of a decoded token."""
    append = KVCache.append

    def spoiled(cache, layer, k, v, first=0):
        broken = layer == LAYER and env_rank(os.environ) == RANK and k.shape[1] == 1
        return append(cache, layer, 0 * k if broken else k, v, first)

    KVCache.append = spoiled


def picture(page, path, options):
    """Write the upper left part of a page as a PNG file."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        size = [f"--window-size=1280,{HEIGHT}", f"--force-device-scale-factor={SCALE}"]
        command = [chromium, *BROWSER, *size, f"--user-data-dir={folder}/profile", *options]
        command += [f"--screenshot={shot}", page.as_uri()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        image = Image.open(shot).convert("RGB").crop((0, 0, SCALE * WIDTH, SCALE * HEIGHT))
        empty = Image.new("RGB", image.size, image.getpixel((0, 0)))
        bottom = ImageChops.difference(image, empty).getbbox()[3] + SCALE * MARGIN
        image = image.crop((0, 0, SCALE * WIDTH, min(bottom, SCALE * HEIGHT)))
        image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1).save(path, optimize=True)


def draw():
    """Run the check and write both pictures next to this file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "check.html"
        main([*COMMAND, "--report", str(report)], worker=[sys.executable, __file__, "worker"])
        report.write_text(report.read_text("utf-8").replace("</head>", f"{STYLE}</head>"), "utf-8")
        for name, options in (("check-map.png", []), ("check-map-dark.png", [DARK])):
            picture(report, Path(__file__).with_name(name), options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        spoil_the_cache()
        sys.argv = ["minitp", *sys.argv[2:]]
        sys.exit(main())
    draw()
