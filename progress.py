"""How far a measurement of many images has come, whichever experiment makes it."""

import time
from collections.abc import Callable

from tqdm import tqdm

from training import Training


class Progress:
    """How far a measurement has come, in images: a bar on a terminal. Answers signals between chunks.

    When the first chunk has been timed, it says how long the whole will take, if that is more than a minute.
    """

    def __init__(self, run: Training, images: int):
        self.run, self.images, self.done, self.told = run, images, 0, False
        self.started, silent = time.monotonic(), run.record.bar.disable
        self.bar = tqdm(total=images, desc=f"step {run.step}", unit="image", leave=False, disable=silent)

    def chunks_of(self, size: int) -> Callable[[], None]:
        """What to call before every chunk of `size` images."""

        return lambda: self.before(size)

    def before(self, images: float) -> None:
        """To be called before every pass over so many images."""
        self.run.check_signals()
        if self.done and not self.told:
            self.tell()
        self.done += images
        self.bar.update(round(images))

    def tell(self) -> None:
        """Say how long it will take."""
        self.told = True
        minutes = (time.monotonic() - self.started) / self.done * self.images / 60
        if minutes > 1:
            with tqdm.external_write_mode():
                print(f"measuring at step {self.run.step}: {self.images:,} images, {minutes:.0f} minutes", flush=True)
