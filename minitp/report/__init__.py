"""The HTML pages of `minitp check --report` and `minitp compare --report`.

page.py      one page that needs no network: page.html, style.css and the scripts, with the data in it
check.py     what the page shows of a check
compare.py   what it shows of a comparison
"""
