"""`parti-jax vocabulary`: trains a SentencePiece vocabulary on the captions of a source or mixture.

For generators whose text is a class, it writes the names and numbers of the classes instead.
"""

import argparse
import itertools
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import tqdm

from parti_jax.core import checks
from parti_jax.core import gin_config
from parti_jax.core import storage
from parti_jax.core import texts
from parti_jax.core.errors import UserError
from parti_jax.data import class_names
from parti_jax.data import class_tokenizer
from parti_jax.data import vocabulary

# Maximum captions to measure the new vocabulary on.
_MEASURED_CAPTIONS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  gin_config.add_gin_arguments(parser)
  parser.add_argument(
    '--task',
    help='the captions of this task, such as mixture_texts for those of all sources of a mixture '
    '(default: of the source that gin chooses)',
  )
  parser.add_argument(
    '--classes',
    metavar='FILE',
    help='instead of training, write the vocabulary of a class-conditional generator: the classes of a '
    'file of names such as LOC_synset_mapping.txt, which texts give by their name or number',
  )
  parser.add_argument('--output', required=True, metavar='FILE', help='the model file to write')
  parser.add_argument(
    '--size',
    type=int,
    default=16_000,
    help='number of ids, including the three special ones (default: %(default)s, from the paper)',
  )
  parser.add_argument(
    '--at_most',
    action='store_true',
    help="use fewer ids than --size if the captions don't support as many",
  )
  parser.add_argument(
    '--split', default='train', help="the sources' split to train on (default: %(default)s)"
  )
  parser.add_argument(
    '--model_type',
    choices=('unigram', 'bpe'),
    default='unigram',
    help='bpe keeps more words whole with few captions (default: %(default)s)',
  )
  parser.add_argument(
    '--character_coverage',
    type=float,
    default=0.9995,
    help='fraction of the characters in the captions that get an id; the rarest others '
    'become unknown (default: %(default)s)',
  )


def run(args: argparse.Namespace) -> int:
  """Trains and writes the vocabulary, and prints how it fits the captions."""
  if args.classes is not None:
    return _write_classes(args)
  if not 0.98 <= args.character_coverage <= 1:
    raise UserError(f'--character_coverage={args.character_coverage} must be from 0.98 to 1')
  checks.count('--size', args.size)
  # gin can't register names after it has parsed values.
  from parti_jax.data import datasets  # noqa: F401

  gin_config.parse(args.gin_file, args.gin_bindings)
  found = _sources(args.task)
  captions = _with_text(found, args.split)
  model = vocabulary.train_vocabulary(
    tqdm.tqdm(captions, desc='captions', unit='', disable=None),
    args.size,
    args.output,
    args.model_type,
    args.character_coverage,
    args.at_most,
  )
  measured = itertools.islice(_with_text(found, args.split), _MEASURED_CAPTIONS)
  print(f'{args.output}: {model.size:,} ids')
  print(_fit(model, measured))
  return 0


def _write_classes(args: argparse.Namespace) -> int:
  """Writes the vocabulary of classes."""
  if args.task is not None or args.gin_file or args.gin_bindings:
    raise UserError('--classes reads no captions; leave out --task, --gin_file and --gin.NAME')
  classes = class_names.read(args.classes)
  content = class_tokenizer.content(len(classes), classes)
  try:
    storage.write(args.output, content)
  except OSError as error:
    raise UserError(
      f'--output {args.output} cannot be written ({error.strerror or error})'
    ) from error
  print(f'{args.output}: {len(classes):,} classes, and an id for none')
  return 0


def _sources(task: str | None) -> list[Any]:
  """Returns the sources of a task, of a mixture, or the one that gin chooses."""
  from parti_jax.data import datasets
  from parti_jax.data import mixtures
  from parti_jax.data import sources

  if task is None:
    return [sources.configured(sources.chosen())]
  if not mixtures.is_one(task):
    return [sources.configured(datasets.source_name(task))]
  found = []
  for part in mixtures.tasks(task):
    with mixtures.naming(part):
      found.append(sources.configured(datasets.source_name(part)))
  return found


def _with_text(sources: Sequence[Any], split: str) -> Iterator[str]:
  """Yields the captions that aren't blank, of one source after the other."""
  for source in sources:
    source.check_split(split)
  for source in sources:
    found = False
    for caption in source.captions(split):
      if caption.strip():
        found = True
        yield caption
    if not found:
      raise UserError(f'{source.name} has no caption in split {split!r}')


def _fit(model: vocabulary.TextVocabulary, captions: Iterable[str]) -> str:
  """Returns a line about the number of tokens in captions, and the share of known tokens."""
  count = tokens = unknown = 0
  longest, most = '', 0
  for caption in captions:
    ids = model.encode_whole(caption)
    count += 1
    tokens += len(ids)
    unknown += ids.count(vocabulary.UNK_ID)
    if len(ids) > most:
      longest, most = caption, len(ids)
  return (
    f'{texts.counted(count, "caption")}: {tokens / count:.1f} tokens on average, at most {most} '
    f'({longest!r}), including the end; {1 - unknown / tokens:.2%} of the tokens are known'
  )
