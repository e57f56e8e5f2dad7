"""Images and the loaders that feed them. Importing this module registers the built-in datasets and loaders."""

from fahooks.data.datasets import Dataset as Dataset
from fahooks.data.datasets import Images as Images
from fahooks.data.datasets import load as load
from fahooks.data.memory import MemoryLoader as MemoryLoader
from fahooks.data.order import Batch as Batch
from fahooks.data.order import epoch_order as epoch_order
from fahooks.data.split import Split as Split
from fahooks.data.split import split as split
