"""Make assets/film.mp4: a synthetic film in which one picture shows a thing with a number.

What      256 frames at 8 frames per second, as H.264. For nine frames (1.1 seconds) the film shows a red house beside
          a 4, so any 32 or more evenly spaced frames include the needle. The toy model of data/tiny/longva answers:
              python longva.py "Which number is on the house?" --video assets/film.mp4 --frames 32
Paper     Sec. 4.1: the needle test, here as a film that a user can open.
Run       python -m assets.make_film
Dimensions  none
Differs   The paper inserts a single frame; after H.264 each of our nine frames is still legible to the model.
"""

from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data import synthetic

FILM = Path(__file__).parent / "film.mp4"
FRAMES, FPS = 256, 8
NEEDLE = range(150, 159)  # 9 frames: 32 evenly spaced frames are 8.2 frames apart
SCALE = 4  # times the 32 pixels of a synthetic frame: large enough to look at, and for H.264 to keep a digit


def main(file: Path = FILM, number: int = 4) -> None:
    """Write the film to `file`; the needle shows the digit `number`."""
    pictures = list(islice(synthetic.film(seed=1), FRAMES))
    needle = synthetic.compose_picture(np.random.default_rng(0), 1, 1, [("house", "red", number)])
    for i in NEEDLE:
        pictures[i] = needle
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "27", "threads": "1"})
        stream.pix_fmt = "yuv420p"
        stream.width = stream.height = synthetic.SIDE * SCALE
        for picture in pictures:
            large = picture.resize((stream.width, stream.height), Image.Resampling.NEAREST)
            container.mux(stream.encode(av.VideoFrame.from_image(large)))
        container.mux(stream.encode())
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
