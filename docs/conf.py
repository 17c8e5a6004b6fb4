"""How Sphinx makes pages. The source folder is generated: see nbs/ops/50e_docs.ipynb; `xsmom docs build` calls it."""

from xsmom_nb import __version__
from xsmom_nb.runs.page import notebook_library

notebook_library()  # before an extension imports it: without the grammar that takes longer than a dozen pages

project = "xsmom_nb"
author = "The xsmom_nb authors"
project_copyright = author
version = release = __version__
language = "en"

extensions = ["myst_nb", "xsmom_nb.ops.formulas"]
root_doc = "index"
exclude_patterns = ["files"]  # plain files that pages link to

# Notebooks come with their outputs, made beforehand; nothing of theirs may fetch a script.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

add_module_names = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "xsmom_nb"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/mark.svg"
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_sidebars = {"index": [], "quickstart": [], "architecture": []}
html_theme_options = {
    "logo": {"text": "xsmom_nb", "image_light": "_static/mark.svg", "image_dark": "_static/mark.svg"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "navigation_depth": 3,
    "collapse_navigation": True,
    "show_nav_level": 1,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}
