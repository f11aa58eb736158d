"""The HTML pages of `minitp check --report` and `minitp compare --report`.

page.py      writes the page: page.html, with style.css, the scripts and the data inserted
check.py     the data of a check
compare.py   the data of a comparison
weights.py   the columns and cells of the checkpoint's tensors
steps.py     explanations of the steps

The scripts: data.js holds the data and the selection, head.js the verdict and the Markdown, thumbs.js the
choice of a pass and a rank, map.js the map, pictures.js the pictures of two arrays, details.js the numbers of
the selected step, layer.js the drawing of a layer, growth.js the curves of the total error, plan.js the
sharding plan; start.js draws the whole page.
"""
