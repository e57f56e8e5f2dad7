"""The `ffcv` loader: .beton files, written and read here, decoded by FFCV's own library and one compiled kernel.

Of FFCV (Leclerc et al. 2023, https://arxiv.org/abs/2306.12517) this takes the file format and the decoder, and leaves out its
Loader, its pipelines and its DatasetWriter. With version 1.0.2 these were seen to

- wait for ever once a stage of a pipeline raises, once compiled stages follow others, and once a process that writes raises;
- leave a thread and its buffers behind at every loop that ends early;
- overwrite batches that were given out before, on a CPU;
- augment by random numbers that `seed` does not reach;
- give out images that can not be decoded as noise or as black, without a word;
- drop the last batch unless told not to;
- set the number of torch's threads for the whole process, at import;
- compile for seconds in each process, at import.

Files that are written here can be read by FFCV, and a test does so.
"""
