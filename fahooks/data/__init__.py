"""Images and the loaders that feed them. Importing this module registers the built-in datasets, augmentations and loaders."""

from fahooks.data.augmentation import Augment as Augment
from fahooks.data.datasets import Dataset as Dataset
from fahooks.data.datasets import load as load
from fahooks.data.examples import Examples as Examples
from fahooks.data.examples import Images as Images
from fahooks.data.image_folder import read_folder as read_folder
from fahooks.data.loader import Batch as Batch
from fahooks.data.loader import Loader as Loader
from fahooks.data.loader import Stream as Stream
from fahooks.data.loader import View as View
from fahooks.data.memory import MemoryLoader as MemoryLoader
from fahooks.data.order import Share as Share
from fahooks.data.order import epoch_order as epoch_order
from fahooks.data.split import Split as Split
from fahooks.data.split import split as split
