"""Recipes: one YAML file is one run. The schema, reading with line marks, `base:` and `--set`, and every error at once.

Whatever is wrong is reported together, each as `file:line: dotted.key: what is wrong (got ...) - did you mean ...?`.
"""

from fahooks.recipe.checking import left_out as left_out
from fahooks.recipe.checking import own_options as own_options
from fahooks.recipe.checking import with_defaults as with_defaults
from fahooks.recipe.loading import RecipeError as RecipeError
from fahooks.recipe.loading import Shipped as Shipped
from fahooks.recipe.loading import copy as copy
from fahooks.recipe.loading import find as find
from fahooks.recipe.loading import list_recipes as list_recipes
from fahooks.recipe.loading import load as load
from fahooks.recipe.loading import load_marked as load_marked
from fahooks.recipe.loading import read_plain as read_plain
from fahooks.recipe.loading import shipped_names as shipped_names
from fahooks.recipe.origins import Line as Line
from fahooks.recipe.origins import explain as explain
from fahooks.recipe.reading import Source as Source
from fahooks.recipe.reading import read_file as read_file
from fahooks.recipe.schema import SGD as SGD
from fahooks.recipe.schema import Adam as Adam
from fahooks.recipe.schema import AdamW as AdamW
from fahooks.recipe.schema import Constant as Constant
from fahooks.recipe.schema import Cosine as Cosine
from fahooks.recipe.schema import Hook as Hook
from fahooks.recipe.schema import Paper as Paper
from fahooks.recipe.schema import Recipe as Recipe
from fahooks.recipe.schema import Step as Step
from fahooks.recipe.tree import Key as Key
from fahooks.recipe.tree import printable as printable
