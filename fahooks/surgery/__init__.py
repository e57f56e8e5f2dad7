"""Surgery: turn the layers of a model into feedback layers, in place, and back.

A converted layer is the same object with the same parameters; only its class is swapped for `Feedback<Class>`, and its
feedback rule sits beside its weight as `layer.feedback`. Its forward is the class's own, with the convolution and linear
calls inside it routed to `fahooks.functional`.
"""

from fahooks.surgery.conversion import backprop as backprop
from fahooks.surgery.conversion import convert as convert
from fahooks.surgery.conversion import feedback_layers as feedback_layers
from fahooks.surgery.conversion import feedback_rules as feedback_rules
from fahooks.surgery.conversion import revert as revert
from fahooks.surgery.layer import FeedbackLayer as FeedbackLayer
from fahooks.surgery.report import LayerReport as LayerReport
from fahooks.surgery.report import Report as Report
from fahooks.surgery.sites import CONVERTIBLE as CONVERTIBLE
from fahooks.surgery.sites import ConversionError as ConversionError
from fahooks.surgery.sites import lineage as lineage
