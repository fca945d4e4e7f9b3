"""How programs take their options, read from what their help says: llama.cpp's of today, of August 2024, and a fork's."""

from __future__ import annotations

from imatrix_runner.toolchain.usage import Usage, read_usage

CURRENT = """\
-e,    --escape, --no-escape            whether to process escapes sequences (\\n, \\r, \\t, \\', \\", \\\\)
                                        (default: false)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM, either an exact number,
                                        'auto', or 'all' (default: auto)
--check-tensors                         check model tensor data for invalid values
-o,    --output, --output-file FNAME    output file (default: 'imatrix.gguf')
--output-format {gguf,dat}              output format for imatrix file (default: gguf)
       -m model.gguf -f some-text.txt [-o imatrix.gguf] [--output-format {gguf,dat}]
"""
OLD = """\
  -e,    --escape                 process escapes sequences (\\n, \\r, \\t, \\', \\", \\\\) (default: true)
         --no-escape              do not process escape sequences
  -fa,   --flash-attn             enable Flash Attention (default: disabled)
  -ngl,  --gpu-layers N           number of layers to store in VRAM
                                  --n-gpu-layers N
         --no-mmap                do not memory-map model
         --log-new                Create a separate new log file on start.
  -o,    --output FNAME           output file (default: 'imatrix.dat')
"""
FORK = """\
  -no-fa, --no-flash-attn         disable Flash Attention (default: enabled)
  -fa, --flash-attn (auto|on|off|0|1)
                                  set Flash Attention
  -o,    --output FNAME           output file (default: 'imatrix.dat')
         --output-format FORMAT   output format: table, jsonl, or csv (default: table)
"""


def test_current_programs() -> None:
    usage = read_usage(CURRENT)
    assert usage == Usage(usage.flags)
    assert "--check-tensors" in usage.flags
    assert not usage.flags & {"-fa", "--flash-attn", "-ngl", "-o", "--output-format"}


def test_a_release_of_2024() -> None:
    usage = read_usage(OLD)
    assert (usage.escapes, usage.named_layers, usage.legacy_matrix, usage.leaves_log) == (True, False, True, True)
    assert {"-fa", "--flash-attn", "--no-mmap"} <= usage.flags
    assert not usage.flags & {"-o", "-ngl"}


def test_a_fork_that_takes_words_and_writes_the_legacy_format() -> None:
    """Its ``--output-format`` is another program's, for all programs share one help."""
    usage = read_usage(FORK)
    assert usage.legacy_matrix
    assert "-no-fa" in usage.flags
    assert "-fa" not in usage.flags
