"""Images and the loaders that feed them. Importing this module registers the built-in datasets, augmentations and loaders."""

from fahooks.data.augmentation import Augment as Augment
from fahooks.data.augmentation import Augmentation as Augmentation
from fahooks.data.choice import choose_loader as choose_loader
from fahooks.data.datasets import Dataset as Dataset
from fahooks.data.datasets import load as load
from fahooks.data.draw import Draw as Draw
from fahooks.data.examples import Examples as Examples
from fahooks.data.examples import Files as Files
from fahooks.data.examples import Images as Images
from fahooks.data.ffcv.loader import FfcvLoader as FfcvLoader
from fahooks.data.framing import Framing as Framing
from fahooks.data.image_folder import image_files as image_files
from fahooks.data.loader import Batch as Batch
from fahooks.data.loader import Loader as Loader
from fahooks.data.loader import Stream as Stream
from fahooks.data.loader import View as View
from fahooks.data.memory import MemoryLoader as MemoryLoader
from fahooks.data.order import Share as Share
from fahooks.data.order import epoch_order as epoch_order
from fahooks.data.split import Split as Split
from fahooks.data.split import split as split
from fahooks.data.torchvision import TorchvisionLoader as TorchvisionLoader
