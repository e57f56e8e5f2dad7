"""Models by name. Importing this package registers the paper's networks."""

from fahooks.models.lookup import build as build
from fahooks.models.lookup import build_for_images as build_for_images
from fahooks.models.lookup import check as check
from fahooks.models.lookup import input_size as input_size
from fahooks.models.lookup import options_for_images as options_for_images
from fahooks.models.paper import fan_in_ as fan_in_
