"""``relay-bench report``: result files as one HTML page that needs nothing else.

Plots are inline SVG, drawn here: no script runs and nothing is loaded, so the page can be mailed, printed and kept.
`scale` and `svg` draw, `plots` know what is worth drawing of a result, `page` puts it together.
"""
