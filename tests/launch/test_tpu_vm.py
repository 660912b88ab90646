"""launch/tpu_vm: the commands that it prints, and what they do on two hosts that stand in."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest

from parti_jax.runs import preemption

pytestmark = pytest.mark.process

SLICE = ('--name=parti', '--zone=us-central2-b', '--project=pictures')
WHERE = '--zone=us-central2-b --project=pictures'
ON_HOST = 'parti_jax/source/launch/tpu_vm/on_host.sh'
DESCRIBE = (
  "gcloud compute tpus queued-resources describe parti '--format=value(state.state)' "
  f'--verbosity=error {WHERE}'
)
SSH = 'gcloud compute tpus tpu-vm ssh parti --worker='
STATES = (
  f"{SSH}all '--command=if [ -e {ON_HOST} ]; then bash {ON_HOST} status; "
  f'else echo "$(hostname) none"; fi\' {WHERE}'
)
SCRIPTS = (
  'create.sh',
  'install.sh',
  'run.sh',
  'tokenize.sh',
  'logs.sh',
  'status.sh',
  'stop.sh',
  'resume.sh',
  'delete.sh',
)


def _create(flags):
  return f'gcloud compute tpus queued-resources create parti --node-id=parti {flags} {WHERE}'


def _kept(cloud):
  return cloud.folder / '.local' / 'state' / 'parti_jax' / 'pictures' / 'us-central2-b' / 'parti'


def _install(cloud, revision):
  kept = _kept(cloud)
  return [
    f'mkdir -p {kept}',
    f'git -C {cloud.checkout} archive --format=tar.gz --output={kept}/source.tar.gz {revision}',
    f'gcloud compute tpus tpu-vm scp {kept}/source.tar.gz parti:parti_jax_source.tar.gz '
    f'--worker=all {WHERE}',
    f"{SSH}all '--command=rm -rf parti_jax/new && mkdir -p parti_jax/new && "
    'tar -xzf parti_jax_source.tar.gz -C parti_jax/new && '
    f"bash parti_jax/new/launch/tpu_vm/on_host.sh install' {WHERE}",
  ]


def _dry(cloud, script, *arguments, **variables):
  lines = cloud.must(script, '--dry_run', *arguments, **variables).splitlines()
  assert not cloud.calls('')  # Nothing is run.
  return lines


@pytest.mark.parametrize(
  'script, arguments, expected',
  [
    (
      'create.sh',
      ['--type=v4-1024', '--spot', '--network=mine'],
      [
        _create(
          '--accelerator-type=v4-1024 --runtime-version=tpu-ubuntu2204-base --async --spot '
          '--network=mine'
        ),
        DESCRIBE,
      ],
    ),
    (
      'create.sh',
      ['--type', 'v9-8', '--version', 'new'],
      [_create('--accelerator-type=v9-8 --runtime-version=new --async'), DESCRIBE],
    ),
    ('logs.sh', [], [f"{SSH}0 '--command=bash {ON_HOST} logs 100' {WHERE}"]),
    (
      'logs.sh',
      ['--worker=all', '--lines=5'],
      [f"{SSH}all '--command=bash {ON_HOST} logs 5' {WHERE}"],
    ),
    ('status.sh', [], [DESCRIBE, STATES]),
    ('stop.sh', [], [f"{SSH}all '--command=bash {ON_HOST} stop stopped' {WHERE}"]),
    (
      'run.sh',
      ['--model_dir=gs://pictures/run', '--gin.train.steps=10'],
      [
        f"{SSH}all '--command=bash {ON_HOST} start train --multi_host "
        f"--model_dir=gs://pictures/run --gin.train.steps=10' {WHERE}"
      ],
    ),
    (
      'tokenize.sh',
      ['--tokenizer=gs://pictures/run', '--output_dir', 'gs://pictures/tokens'],
      [
        f"{SSH}all '--command=bash {ON_HOST} start tokenize --multi_host "
        f"--tokenizer=gs://pictures/run --output_dir gs://pictures/tokens' {WHERE}"
      ],
    ),
    (
      'install.sh',
      ['--url=https://example.org/a b', '--revision=v1'],
      [
        f"{SSH}all '--command=rm -rf parti_jax/new && mkdir -p parti_jax/new && git clone --quiet "
        "'\\''https://example.org/a b'\\'' parti_jax/new && git -C parti_jax/new checkout --quiet "
        f"v1 && bash parti_jax/new/launch/tpu_vm/on_host.sh install' {WHERE}"
      ],
    ),
  ],
)
def test_dry_run_prints_the_commands(cloud, script, arguments, expected):
  assert _dry(cloud, script, *arguments) == expected


def test_dry_run_of_install_sends_the_commit(cloud, head):
  assert _dry(cloud, 'install.sh') == _install(cloud, head)


def test_dry_run_of_delete(cloud):
  delete = 'gcloud compute tpus queued-resources delete parti --force'
  kept = f'rm -rf {_kept(cloud)}'
  assert _dry(cloud, 'delete.sh') == [f'{delete} {WHERE}', kept]
  assert _dry(cloud, 'delete.sh', '--yes') == [f'{delete} --quiet {WHERE}', kept]


def test_dry_run_of_resume_says_what_follows_a_preemption(started, head):
  cloud = started.cloud
  assert cloud.must('resume.sh', '--dry_run').splitlines() == [
    f'gcloud compute tpus queued-resources delete parti --force --quiet {WHERE}',
    _create('--accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base --async --spot'),
    DESCRIBE,
    *_install(cloud, head),
    *cloud.must('run.sh', '--dry_run', *started.arguments).splitlines(),
  ]


@pytest.mark.parametrize(
  'type_, version',
  [
    ('v4-512', 'tpu-ubuntu2204-base'),
    ('v5litepod-256', 'v2-alpha-tpuv5-lite'),
    ('v5p-1024', 'v2-alpha-tpuv5'),
    ('v6e-256', 'v2-alpha-tpuv6e'),
  ],
)
def test_runtime_version_follows_from_the_type(cloud, type_, version):
  assert f'--runtime-version={version} ' in _dry(cloud, 'create.sh', f'--type={type_}')[0]


def test_environment_variables_are_defaults(cloud):
  variables = {
    'TPU_NAME': 'mine',
    'ZONE': 'europe-west4-b',
    'PROJECT': 'p',
    'TPU_SSH_FLAGS': '--internal-ip --plain',
  }
  done = cloud.run('stop.sh', '--dry_run', '--zone=us-east5-a', **variables)
  assert done.stdout.endswith(' --zone=us-east5-a --project=p\n')
  assert ' ssh mine --worker=all ' in done.stdout and '--internal-ip --plain' in done.stdout


@pytest.mark.parametrize(
  'script, arguments, message',
  [
    ('create.sh', [*SLICE[1:], '--type=v4-8'], 'no slice given; use --name=NAME'),
    ('stop.sh', [SLICE[0], SLICE[2]], 'no zone given; use --zone=ZONE'),
    ('logs.sh', SLICE[:2], 'no project given; use --project=PROJECT'),
    (
      'delete.sh',
      [*SLICE[1:], '--name=../x'],
      '../x: names, zones and projects consist of lower-case',
    ),
    ('delete.sh', [*SLICE, '--name'], '--name: no value'),
    ('delete.sh', [*SLICE, '--all'], 'unknown argument --all'),
    ('logs.sh', [*SLICE, '--lines=x; y'], '--lines=x; y: not a number'),
    ('create.sh', SLICE, 'use --type=TYPE'),
    ('create.sh', [*SLICE, '--type=h100-8'], '--type=h100-8: not a v2, v3, v4, v5litepod'),
    ('create.sh', [*SLICE, '--type=tpu7x-8'], 'only available through GKE; see docs/gke.md'),
    ('install.sh', [*SLICE, '--revision=nothing'], '--revision=nothing: '),
    ('install.sh', [*SLICE, '--url=u'], 'give --revision=COMMIT as well'),
    ('run.sh', [*SLICE, '--gin_file=a.gin'], 'use --model_dir=gs://BUCKET/FOLDER'),
    ('run.sh', [*SLICE, '--model_dir', 'runs/x'], '--model_dir=runs/x: the hosts of a slice'),
    ('tokenize.sh', [*SLICE, '--tokenizer=gs://a/b'], 'use --output_dir=gs://BUCKET/FOLDER'),
    ('tokenize.sh', [*SLICE, '--output_dir=tokens'], '--output_dir=tokens: the hosts of a slice'),
    ('resume.sh', SLICE, 'create.sh was not called for parti in us-central2-b'),
  ],
)
def test_bad_input_is_named(cloud, script, arguments, message):
  done = cloud.run(script, *arguments)
  assert done.returncode == 2
  assert message in done.stderr and done.stderr.startswith(f'{script}: error: ')
  assert done.stderr.count('\n') == 1
  assert not [call for call in cloud.calls('') if re.search('create|delete|ssh|scp', call)]


@pytest.mark.parametrize('script', SCRIPTS)
def test_without_gcloud_or_login(cloud, script, tmp_path):
  (cloud.folder / 'account').write_text('')
  done = cloud.run(script, *SLICE)
  assert done.returncode == 2 and 'not logged in; run: gcloud auth login' in done.stderr
  tools = tmp_path / 'tools'
  tools.mkdir()
  for name in ('bash', 'dirname', 'basename', 'env'):
    (tools / name).symlink_to(shutil.which(name))
  done = cloud.run(script, *SLICE, PATH=str(tools))
  assert done.returncode == 2 and 'needs gcloud, the Google Cloud CLI; see https' in done.stderr


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_is_the_head_of_the_script(cloud, script):
  done = cloud.run(script, '--help')
  assert done.returncode == 0 and not done.stderr
  assert f'  launch/tpu_vm/{script}' in done.stdout and '--dry_run' in done.stdout
  assert '#' not in done.stdout and 'shellcheck' not in done.stdout


def test_arguments_survive_both_shells(cloud):
  """The printed command, pasted into a shell, gives parti-jax on a host what was typed."""
  arguments = [
    '--gin_file=a.gin',
    '--model_dir=gs://b/r',
    "--gin.train.task='cached_tokens'",
    '--gin.x="two  words"',
    "it's $HOME `id` \\ \" ' * ? ~ !! ; & | < > ()",
    'a\nb',
    '',
    "''",
    '--gin.rules=(("embed", "fsdp"),)',
    '--',
    '--name=of the run',
  ]
  lines = _dry(cloud, 'run.sh', *arguments)
  assert lines[0].startswith(f"{SSH}all '--command=bash {ON_HOST} start train --multi_host ")
  cloud.must('create.sh', '--type=v4-16')
  cloud.must('install.sh')
  subprocess.run(['bash', '-c', '\n'.join(lines)], check=True, env=cloud.environment())
  arguments.remove('--')  # Ends the script's own flags.
  said = ''.join(f'<{argument}>\n' for argument in ['train', '--multi_host', *arguments])
  for host in cloud.hosts():
    _wait_for(
      lambda host=host: (host / 'arguments').exists() and (host / 'arguments').read_text() == said
    )


def _wait_for(condition):
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end, 'it did not happen'
    time.sleep(0.05)


def _states(cloud):
  return cloud.must('status.sh').split('\n')[1:-1]


def _end(cloud, status):
  for host in cloud.hosts():
    (host / 'end').write_text(str(status))


def test_a_run_from_its_start_to_its_end(started):
  cloud = started.cloud
  assert _states(cloud) == ['host0 running', 'host1 running']
  again = cloud.run('run.sh', *SLICE, *started.arguments)
  assert again.returncode == 2 and 'host1: error: a run is active here already' in again.stderr
  install = cloud.run('install.sh', *SLICE)
  assert install.returncode != 0 and 'host0: error: a run is active here; end it' in install.stderr
  assert _states(cloud) == ['host0 running', 'host1 running']
  _end(cloud, 0)
  logs = cloud.must('logs.sh', '--worker=all')  # It returns when the run has ended.
  for host in ('host0', 'host1'):
    assert re.search(f'{host}: .*: parti-jax train --multi_host --gin_file=a.gin', logs)
    assert f'{host}: loss 9.0\n' in logs
  _wait_for(lambda: _states(cloud) == ['host0 finished', 'host1 finished'])
  assert 'the run is finished' in cloud.must('resume.sh')


def test_a_failure_is_told(started):
  _end(started.cloud, 3)
  _wait_for(lambda: _states(started.cloud) == ['host0 failed 3', 'host1 failed 3'])
  watched = started.cloud.run('resume.sh', *SLICE, '--watch')
  assert watched.returncode == 1 and 'the run failed; see ' in watched.stderr


def test_a_checkpoint_before_a_preemption_is_no_failure(started):
  _end(started.cloud, preemption.STATUS)  # `stop.sh` did not tell it to stop.
  _wait_for(lambda: _states(started.cloud) == ['host0 gone', 'host1 gone'])
  for host in started.cloud.hosts():
    (host / 'end').unlink()
  started.cloud.must('resume.sh')
  assert _states(started.cloud) == ['host0 running', 'host1 running']


def test_stop_and_resume(started):
  cloud = started.cloud
  assert cloud.must('stop.sh').splitlines() == ['host0 stopped', 'host1 stopped']
  assert _states(cloud) == ['host0 stopped', 'host1 stopped']
  cloud.must('resume.sh')
  assert _states(cloud) == ['host0 running', 'host1 running']
  assert len(cloud.calls('queued-resources create')) == 1


def test_install_sends_the_commit_alone(cloud, checkout):
  (checkout / 'parti_jax' / 'new').write_text('not committed')
  cloud.must('create.sh', '--type=v4-16')
  done = cloud.run('install.sh', *SLICE)
  assert 'not committed are not sent' in done.stderr
  for host in cloud.hosts():
    source = host / 'parti_jax' / 'source'
    assert (source / 'parti_jax' / 'file').exists() and not (source / 'parti_jax' / 'new').exists()
    assert 'Installing' in done.stdout


def test_install_fetches_a_python_where_the_hosts_is_too_old(cloud, write_program):
  for name in ('python3.11', 'python3.12', 'python3.13', 'python'):
    write_program(cloud.folder / 'host_bin' / name, '#!/bin/sh\nexit 1\n')
  # pip puts a uv there, whose Python says what it is asked for and makes environments.
  environment = cloud.folder / 'environment'
  shutil.move(cloud.folder / 'new_host' / 'parti_jax' / 'venv', environment)
  write_program(
    cloud.folder / 'uv',
    f"""#!/bin/sh
case "$*" in
  "python install 3.12") ;;
  "python find --managed-python 3.12") echo {cloud.folder}/python ;;
  *) exit 1 ;;
esac
""",
  )
  write_program(
    cloud.folder / 'python',
    f'#!/bin/sh\n[ "$2" != venv ] || cp -R {environment} "$3"\necho Python 3.12\n',
  )
  write_program(
    cloud.folder / 'host_bin' / 'python3',
    f"""#!/bin/sh
[ "$1 $2 $3 $6 $7" = "-m pip install --target $HOME/parti_jax/uv" ] || exit 1
mkdir -p "$7/bin" && cp {cloud.folder}/uv "$7/bin/uv"
""",
  )
  cloud.must('create.sh', '--type=v4-16')
  assert cloud.must('install.sh').count('with Python 3.12\n') == 2
  assert all((host / 'parti_jax/venv/bin/pip').exists() for host in cloud.hosts())


def test_install_clones_a_url(cloud, checkout, head):
  cloud.must('create.sh', '--type=v4-16')
  cloud.must('install.sh', f'--url={checkout}', f'--revision={head}')
  assert all((host / ON_HOST).exists() for host in cloud.hosts())


def test_run_needs_an_installation(cloud):
  cloud.must('create.sh', '--type=v4-16')
  done = cloud.run('run.sh', *SLICE, '--model_dir=gs://b/r')
  assert done.returncode == 2 and 'did not start on every host' in done.stderr
  assert _states(cloud) == ['host0 none', 'host1 none']


@pytest.mark.parametrize('flags', [['--type=v4-8'], ['--type=v4-16']])
def test_a_local_folder_does_for_one_host_or_a_shared_disk(cloud, flags):
  cloud.must('create.sh', *flags)
  disk = [] if flags == ['--type=v4-8'] else ['--shared_disk']
  assert 'model_dir=/mnt/run' in cloud.must('run.sh', '--dry_run', '--model_dir=/mnt/run', *disk)


@pytest.mark.parametrize('state', ['SUSPENDED', 'FAILED'])
def test_resume_after_preemption(started, head, state):
  cloud = started.cloud
  (cloud.folder / 'state').write_text(state)
  (cloud.checkout / 'parti_jax' / 'file').write_text('changed since')
  cloud.must('resume.sh')
  assert cloud.calls('queued-resources delete parti --force --quiet')
  first, second = cloud.calls('queued-resources create')
  assert first == second and '--spot' in first
  assert _states(cloud) == ['host0 running', 'host1 running']
  for host in cloud.hosts():
    _wait_for((host / 'arguments').exists)
    assert (host / 'arguments').read_text().splitlines() == [
      '<train>',
      '<--multi_host>',
      *(f'<{argument}>' for argument in started.arguments),
    ]
    assert (host / 'parti_jax' / 'source' / 'parti_jax' / 'file').read_text() == '1'
  assert head in (_kept(cloud) / 'install').read_text()
  assert 'the run is running' in cloud.must('resume.sh')


def test_a_host_that_lost_its_run_has_all_started_again(started):
  cloud = started.cloud
  host = cloud.hosts()[0]
  os.killpg(int((host / 'parti_jax' / 'pid').read_text()), signal.SIGKILL)
  _wait_for(lambda: _states(cloud) == ['host0 gone', 'host1 running'])
  cloud.must('resume.sh')
  assert _states(cloud) == ['host0 running', 'host1 running']
  assert len(cloud.calls('queued-resources create')) == 1


def test_watch_resumes_each_time_until_the_run_is_finished(started):
  cloud = started.cloud
  watch = subprocess.Popen(
    [cloud.checkout / 'launch' / 'tpu_vm' / 'resume.sh', *SLICE, '--watch'],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=cloud.environment(),
  )
  for times in (2, 3):
    (cloud.folder / 'state').write_text('SUSPENDED')
    _wait_for(lambda times=times: len(cloud.calls(' start train ')) == times)
    _wait_for(lambda: all((host / 'arguments').exists() for host in cloud.hosts()))
  _end(cloud, 0)
  said, _ = watch.communicate(timeout=30)
  assert watch.returncode == 0, said
  assert said.endswith('parti: the run is finished\n')


def test_create_waits_and_says_when_it_is_refused(cloud):
  (cloud.folder / 'next_state').write_text('FAILED\n')
  done = cloud.run('create.sh', *SLICE, '--type=v4-16')
  assert done.returncode == 2
  assert 'parti: FAILED' in done.stdout and 'the queued resource parti is FAILED' in done.stderr


TOKENIZE = ('--tokenizer=gs://pictures/tokenizer', '--output_dir=gs://pictures/tokens')


@pytest.mark.parametrize('first, second', [('tokenize', 'run'), ('run', 'tokenize')])
def test_resume_starts_what_was_started_last(cloud, first, second):
  arguments = {'run': ('--model_dir=gs://pictures/run',), 'tokenize': TOKENIZE}
  commands = {'run': 'train', 'tokenize': 'tokenize'}
  cloud.must('create.sh', '--type=v4-16', '--spot')
  cloud.must('install.sh')
  for script in (first, second):
    cloud.must(f'{script}.sh', *arguments[script])
    assert _states(cloud) == ['host0 running', 'host1 running']
    # As a process ends that is asked to stop: to be started again.
    _end(cloud, preemption.STATUS)
    _wait_for(lambda: _states(cloud) == ['host0 gone', 'host1 gone'])
    for host in cloud.hosts():
      (host / 'end').unlink()
      (host / 'arguments').unlink()
    cloud.must('resume.sh')
    for host in cloud.hosts():
      _wait_for((host / 'arguments').exists)
      assert (host / 'arguments').read_text().splitlines() == [
        f'<{commands[script]}>',
        '<--multi_host>',
        *(f'<{argument}>' for argument in arguments[script]),
      ]
    assert cloud.must('stop.sh').splitlines() == ['host0 stopped', 'host1 stopped']


def test_tokens_on_a_shared_disk_are_resumed_there_after_a_preemption(cloud):
  cloud.must('create.sh', '--type=v4-16', '--spot')
  cloud.must('install.sh')
  flags = ('--output_dir=/mnt/tokens', '--tokenizer=/mnt/tokenizer')
  cloud.must('tokenize.sh', '--shared_disk', *flags)
  (cloud.folder / 'state').write_text('SUSPENDED')
  cloud.must('resume.sh')
  assert _states(cloud) == ['host0 running', 'host1 running']
  for host in cloud.hosts():
    _wait_for((host / 'arguments').exists)
    assert (host / 'arguments').read_text().splitlines() == [
      '<tokenize>',
      '<--multi_host>',
      *(f'<{flag}>' for flag in flags),
    ]


def test_delete_forgets(started):
  cloud = started.cloud
  assert pathlib.Path(_kept(cloud)).exists()
  cloud.must('delete.sh', '--yes')
  assert not _kept(cloud).exists() and cloud.must('status.sh') == 'NONE\n'
