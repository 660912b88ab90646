"""Does a model draw what people ask for in their own words?

  python benchmarks/plain_requests.py [--model FOLDER] [--num_images 4] [--rank]

asks for 60 things that the demo was trained on, in phrasings that no caption of the training has, and for
the same things by their bare names; then for two lists of others, in the words of people who didn't know
the grammar that the captions come from. It prints how often OpenMoji's judge finds the thing: among all
real pictures, the nearest one has the name. With `--rank` only the picture that the ranker puts first counts.
Needs the `data` extra.
"""

import argparse

from parti_jax.data import held_out_requests
from parti_jax.data import openmoji
from parti_jax.evaluation.openmoji import openmoji_judge
from parti_jax.sampling import text_to_image


def measure(model, judge, requests, num_images: int, rank: bool) -> tuple[float, float]:
  """Returns the share of pictures that show the thing, and its standard error over requests.

  Args:
    model: a TextToImage.
    judge: an openmoji_judge.Judge at the model's picture size.
    requests: pairs of a request and a name.
    num_images: pictures drawn for each request.
    rank: whether only the picture that the ranker puts first counts.
  """
  first = {}
  for picture in judge.pictures:
    if not picture.tones:
      first.setdefault(picture.name, picture)
  requests = list(requests)
  asked = [first[name] for _, name in requests]
  drawn = model.generate([text for text, _ in requests], num_images=num_images, seed=0, rank=rank)
  images = drawn.images[:, :1] if rank else drawn.images
  right = judge.judge(asked, images).name_top1.mean(axis=1)
  return float(right.mean()), float(right.std(ddof=1) / len(right) ** 0.5)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--model', help='model folder (default: the demo)')
  parser.add_argument('--num_images', type=int, default=4, help='(%(default)s)')
  parser.add_argument('--rank', action='store_true', help="judge the ranker's first picture alone")
  args = parser.parse_args()
  model = text_to_image.load(args.model)
  judge = openmoji_judge.Judge(openmoji.pictures(), model.image_size)
  print('| | in plain words, % right | by their names, % right |')
  print('|---|---|---|')
  lists = (
    held_out_requests.REQUESTS,
    held_out_requests.MORE_REQUESTS,
    held_out_requests.LATER_REQUESTS,
  )
  for requests, row in zip(lists, ('60 things', '99 others', '100 others'), strict=True):
    bare = [(name, name) for name in requests.values()]
    measured = [
      measure(model, judge, asked, args.num_images, args.rank) for asked in (requests.items(), bare)
    ]
    cells = ' | '.join(f'{100 * mean:.1f} ± {100 * error:.1f}' for mean, error in measured)
    print(f'| {row} | {cells} |', flush=True)


if __name__ == '__main__':
  main()
