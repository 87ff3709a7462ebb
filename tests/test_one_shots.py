"""The drum one-shots: recordings read from real files, the circuit-model corpus, its cache, and the split of both."""

import os
import shutil

import numpy as np
import pytest
import soundfile
import torch
from scipy import signal

from replication import circuit_808, data, tasks
from replication.data import OneShots, recordings_folder
from replication.tasks import make_config

RATE = 44100
TONE = 0.5 * np.sin(2 * np.pi * 200 / RATE * np.arange(1000))


def write(path, audio=TONE, rate_hz=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    aiff = {"format": "AIFF"} if path.suffix.lower() == ".aif" else {}
    soundfile.write(path, audio, rate_hz, **(aiff | options))


@pytest.fixture
def folder(tmp_path):
    """Three good files; what a test adds is read with them."""
    for name in ("BD 01.wav", "SD 01.wav", "CH 01.wav"):
        write(tmp_path / "kit" / name)
    return tmp_path / "kit"


def read(folder, **options):
    return OneShots.from_folder(folder, n_samples=800, **{"min_files": 3, **options})


def one(shots, name):
    return shots.x[shots.names.index(name), 0].numpy()


def refused(folder, *words, **options):
    with pytest.raises(ValueError) as caught:
        read(folder, **options)
    assert all(word in str(caught.value) for word in (str(folder), *words)), caught.value


# ---- recordings -----------------------------------------------------------------------------------------------------


def test_files_of_a_folder(tmp_path, capsys):
    """All formats, prefixes and sub-folders; in the order of their names, on every file system."""
    folder = tmp_path / "Some Kit"
    ramp = np.arange(1, 501) / 1000
    files = ["tom_low.flac", "BD/bd A.wav", "SD 01.aiff", "OH 1.AIF", "CH1.wav"]
    for i, name in enumerate(files):
        write(folder / name, ramp / (i + 1), subtype="PCM_24")
    (folder / "._BD 02.wav").write_bytes(b"resource fork")
    (folder / ".hidden").mkdir()
    (folder / ".hidden/BD 03.wav").write_bytes(b"")
    (folder / "license.txt").write_text("text")
    shots = OneShots.from_folder(folder, n_samples=800, min_files=5)
    assert shots.names == ["BD/bd A.wav", "CH1.wav", "OH 1.AIF", "SD 01.aiff", "tom_low.flac"]
    assert shots.kinds == ["BD", "HH", "HH", "SD", "Tom"]
    assert shots.source == "recordings in Some Kit" and len(shots) == 5
    assert shots.x.shape == (5, 1, 800) and shots.x.dtype == torch.float32
    for name, x in zip(shots.names, shots.x[:, 0].numpy()):
        assert np.abs(x[:500] - ramp / (files.index(name) + 1)).max() < 2.0**-23  # 24 bits
        assert (x[500:] == 0).all()
    assert capsys.readouterr() == ("", "recordings in Some Kit: 5 files; 5 shorter, padded\n")


def test_channels_are_averaged_and_long_sounds_cut_and_it_is_said_once(folder, capsys):
    left, right = np.full(1000, 0.5), np.linspace(-0.25, 0.25, 1000)
    write(folder / "Tom 01.wav", np.stack([left, right], 1), subtype="FLOAT")
    write(folder / "Tom 02.wav", np.stack([left, left, -left], 1)[:500], subtype="FLOAT")
    shots = read(folder)
    assert np.abs(one(shots, "Tom 01.wav") - (left + right)[:800] / 2).max() < 1e-7
    assert np.abs(one(shots, "Tom 02.wav")[:500] - 0.5 / 3).max() < 1e-7
    said = "5 files; 2 of several channels, averaged; 4 longer than 800 samples, cut; 1 shorter, padded\n"
    assert capsys.readouterr() == ("", f"recordings in kit: {said}")


def test_a_lower_rate_is_reached_by_resampling_and_said(folder, capsys):
    """500 Hz stay a sine at a quarter of the rate (1e-3, not at the ends); 20 kHz, which it cannot hold, vanish."""
    low, high = (0.5 * np.sin(2 * np.pi * f_hz * np.arange(4000) / 44100) for f_hz in (500, 20000))
    write(folder / "SD low.wav", low, subtype="FLOAT")
    write(folder / "SD high.wav", low + high, subtype="FLOAT")
    shots = read(folder, sample_rate_hz=11025)
    expected = 0.5 * np.sin(2 * np.pi * 500 * np.arange(800) / 11025)
    for name in ("SD low.wav", "SD high.wav"):
        assert np.abs(one(shots, name) - expected)[20:780].max() < 1e-3
    assert shots.source == "recordings in kit, resampled from 44100 to 11025 Hz"
    assert "recordings in kit: 5 files; resampled from 44100 to 11025 Hz; 2 longer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be a multiple of sample_rate_hz 11025, got 48000"):
        read(folder, sample_rate_hz=11025, file_rate_hz=48000)


ODD = [("WAV", "PCM_U8", 2e-2), ("WAVEX", "FLOAT", 1e-7), ("RF64", "PCM_16", 1e-4), ("AIFF", "DOUBLE", 1e-7)]
ODD += [("AIFF", "PCM_S8", 2e-2), ("WAV", "GSM610", 0.1), ("WAV", "G721_32", 0.1), ("WAV", "IMA_ADPCM", 0.1)]


def test_odd_but_legal_files_are_read(folder):
    """Among them extensible headers and subtypes in which libsndfile cannot seek; lossy ones hold the tone by 0.1."""
    names = {f"BD {kind} {subtype}.{'aif' if kind == 'AIFF' else 'wav'}": (kind, subtype) for kind, subtype, _ in ODD}
    for name, (kind, subtype) in names.items():
        write(folder / name, TONE, format=kind, subtype=subtype)
    shots = read(folder)
    for name, (*_, tolerance) in zip(names, ODD, strict=True):
        assert np.abs(one(shots, name) - TONE[:800]).max() < tolerance, name


def streamed_flac(path):
    """As an encoder writes to a pipe: 0, unknown, as the number of samples, 36 bits from the middle of byte 21."""
    write(path, format="FLAC", subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[21], content[22:26] = content[21] & 0xF0, bytes(4)
    path.write_bytes(content)


def test_a_streamed_wav_has_no_length_in_its_header(folder):
    """As ffmpeg and sox write to a pipe. A size that a file could have is believed, and the file refused as cut off."""
    content = bytearray((folder / "BD 01.wav").read_bytes())
    place = content.index(b"data") + 4
    for length in (0xFFFFFFFF, 0x7FFFF000):
        content[4:8] = content[place : place + 4] = length.to_bytes(4, "little")
        (folder / "BD 02.wav").write_bytes(content)
        assert np.array_equal(one(read(folder), "BD 02.wav"), one(read(folder), "BD 01.wav"))
    content[place : place + 4] = (4000).to_bytes(4, "little")
    (folder / "BD 02.wav").write_bytes(content)
    refused(folder, "BD 02.wav breaks off", "export it again")


def test_a_name_that_is_not_utf_8_is_read_and_printed(folder, monkeypatch):
    """By two digits in its place: in names, in errors, in a config's hash."""
    try:
        (folder / "BD 01.wav").rename(os.fsdecode(os.fsencode(folder) + b"/BD \xff.wav"))
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    shots = read(folder)
    assert shots.names == ["BD \\xff.wav", "CH 01.wav", "SD 01.wav"] and (one(shots, "BD \\xff.wav") != 0).any()
    refused(folder, "BD \\xff.wav has a sample rate of 44100 Hz", sample_rate_hz=48000, file_rate_hz=48000)
    monkeypatch.setenv("TR808_DIR", str(folder))
    assert make_config("tr808_micro", "jtfs", 0, "smoke").sounds.startswith("recordings ")


def sounds():
    tasks._recordings.cache_clear()
    return make_config("tr808_micro", "jtfs", 0, "smoke").sounds


def test_a_relative_folder_of_the_environment_becomes_absolute_for_all_that_follows(folder, monkeypatch):
    """A run's config and its data, made in another working folder, are of the folder named first."""
    other = shutil.copytree(folder, folder.parent / "elsewhere" / "kit")
    write(other / "BD 02.wav")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("TR808_DIR", "kit")
    before = sounds()
    monkeypatch.chdir(other.parent)
    assert os.environ["TR808_DIR"] == str(folder) == str(recordings_folder()) and len(read(None)) == 3
    assert sounds() == before
    monkeypatch.setenv("TR808_DIR", "kit")
    assert make_config("tr808_micro", "jtfs", 0, "smoke").sounds != before
    monkeypatch.delenv("TR808_DIR")
    with pytest.raises(ValueError, match="set the environment variable TR808_DIR"):
        read(None)


def test_another_rate_is_refused_with_the_command_that_converts(folder):
    write(folder / "SD it's.flac", rate_hz=48000)
    quoted = f"""'{folder}/SD it'"'"'s.flac'"""
    command = f"ffmpeg -i {quoted} -ar 44100 converted.flac && mv converted.flac {quoted}"
    refused(folder, "SD it's.flac has a sample rate of 48000 Hz, expected 44100 Hz", command)


@pytest.mark.parametrize(("suffix", "n_samples"), [("wav", 1000), ("aiff", 1000), ("flac", 1000), ("flac", 80000)])
def test_a_file_that_breaks_off_is_refused(folder, suffix, n_samples):
    """Also after the part that is used."""
    path = folder / f"Tom.{suffix}"
    write(path, np.random.default_rng(0).uniform(-0.5, 0.5, n_samples))
    assert len(read(folder)) == 4
    path.write_bytes(path.read_bytes()[: -2000 if n_samples > 1000 else 1200])
    refused(folder, path.name, "again")


def test_only_what_is_read_of_a_folder_is_in_its_config(folder, monkeypatch):
    monkeypatch.setenv("TR808_DIR", str(folder))
    before = sounds()
    (folder / "readme.txt").write_text("text")
    os.mkfifo(folder / "BD 08.wav")  # nobody writes to it: reading would wait for ever
    assert sounds() == before
    write(folder / "sub" / "BD 09.wav")
    assert sounds() != before


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("BD x.wav", lambda p: p.write_bytes(b"no sound at all" * 9), "cannot be read as audio"),
        ("BD x.wav", lambda p: p.write_bytes(b""), "cannot be read as audio (it has 0 bytes)"),
        ("BD x.wav", lambda p: p.symlink_to("nowhere"), "cannot be read as audio"),
        ("BD x.flac", streamed_flac, "cannot be read as audio (its header tells no length)"),
        ("BD x.aif", lambda p: write(p, TONE, subtype="DWVW_16"), "again, as 16 or 24 bit PCM"),
        ("BD x.wav", lambda p: write(p, TONE[:0]), "is empty, it holds 0 samples"),
        ("BD x.wav", lambda p: write(p, TONE * 1e-4), "is silent (-80 dB)"),
        ("BD x.wav", lambda p: write(p, np.stack([TONE, -TONE], 1)), "is silent (-80 dB)"),
        ("BD x.wav", lambda p: write(p, TONE * np.nan, subtype="FLOAT"), "holds NaN or infinite values"),
        ("BD x.wav", lambda p: write(p, TONE * 1e300, subtype="DOUBLE"), "holds NaN or infinite values"),
        ("BDx.wav", write, "unknown kind, expected a name that begins with BD, SD, Tom, OH or CH: rename it"),
        ("808.wav", write, "unknown kind"),
    ],
)
def test_a_bad_file_is_refused_by_name(folder, name, make, words):
    (folder / "sub").mkdir()
    make(folder / "sub" / name)
    with np.errstate(all="raise"):
        refused(folder, name, words)


def test_too_few_files_or_no_folder(folder):
    (folder / "note.txt").write_text("x")
    there = "kit and its sub-folders hold 3 audio files (.wav .flac .aif .aiff) and 1 others"
    refused(folder, there, "at least 4", "lower min_files", min_files=4)
    (folder / "empty").mkdir()
    refused(folder / "empty", "empty and its sub-folders hold 0 audio files", "TR808_DIR")
    refused(folder / "nowhere", "nowhere is no folder: set TR808_DIR")
    refused(folder / "note.txt", "note.txt is no folder")


# ---- split ----------------------------------------------------------------------------------------------------------


def shots_of(n, seed=0):
    return OneShots(torch.zeros(n, 1, 4), [f"BD {i}" for i in range(n)], "test", seed)


def test_the_split_of_the_paper():
    """425 / 128 / 128, another one for another seed; 128 items drawn twice share 24 of 128 on average, std 4."""
    one, other = shots_of(681, 1), shots_of(681, 2)
    parts = one.train, one.val, one.test
    assert [len(part) for part in parts] == [425, 128, 128] and all((part.diff() > 0).all() for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(681)) and torch.equal(one.val, shots_of(681, 1).val)
    for drawn_too in (torch.isin(other.test, one.test), one.test < 128):  # shuffled, not the last items
        assert 5 < drawn_too.sum() < 43
    for n, n_other in ((3, 1), (7, 1), (8, 2), (100, 19), (64, 12)):  # round(n 128 / 681), at least 1
        assert OneShots.sizes(n) == [n - 2 * n_other, n_other, n_other]
    with pytest.raises(ValueError, match="expected 3 sounds or more .* got 2 and 2 names"):
        shots_of(2)


# ---- circuit model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drums():
    """(audio, settings) of six of each voice at 44.1 kHz, one second."""
    rngs = [np.random.default_rng([7, i]) for i in range(30)]
    return {name: [circuit_808.strike(name, rngs.pop(), RATE, RATE) for _ in range(6)] for name in circuit_808.VOICES}


def peak_hz(audio, low_hz, high_hz):
    f_hz = np.fft.rfftfreq(2**17, 1 / RATE)
    magnitude = np.abs(np.fft.rfft(audio * signal.windows.tukey(len(audio), 0.1), 2**17))
    inside = (f_hz > low_hz) & (f_hz < high_hz)
    return f_hz[inside][magnitude[inside].argmax()]


def test_every_drum_starts_on_time_sounds_and_decays(drums):
    for audio, settings in sum(drums.values(), []):
        assert audio.dtype == np.float64 and audio.shape == (RATE,) and np.isfinite(audio).all()
        peak = np.abs(audio).max()
        assert abs(peak - settings["accent"]) < 1e-12 and 4 / 14 <= peak <= 1
        late_s = np.argmax(np.abs(audio) > 0.01 * peak) / RATE - settings["onset_s"]
        assert 0 <= settings["onset_s"] < 1e-3 and abs(late_s) < 0.25e-3  # 11 samples, the last filter's length
        assert np.sum(audio[-RATE // 10 :] ** 2) < 0.02 * np.sum(audio[: RATE // 2] ** 2)
        assert abs(audio.sum()) < 1e-3 * np.abs(np.fft.rfft(audio)).max()  # no direct current


def test_resonators_ring_at_their_frequency(drums):
    """Of the bass drum and toms after sigh and drop; a bass drum that is too short for that is left out."""
    for voice, name, start_s, end_s, between_hz, tolerance in (
        ("BD", "f_hz", 0.2, None, (20, 500), 0.01),
        ("Tom", "f_hz", 0.06, 0.26, (60, 300), 0.02),
        ("SD", "low_hz", 0, None, (144, 216), 0.015),
        ("SD", "high_hz", 0, None, (264, 396), 0.015),
    ):
        long = [drum for drum in drums[voice] if voice != "BD" or drum[1]["decay_s"] > 0.2]
        assert len(long) >= 2
        for audio, settings in long:
            late = audio[int(start_s * RATE) : end_s and int(end_s * RATE)]
            assert abs(peak_hz(late, *between_hz) / settings[name] - 1) < tolerance, voice


def test_decays_are_as_long_as_their_knobs_say(drums):
    """The bass drum falls by 20 dB, a hat's halves differ by 10 dB."""
    for audio, settings in drums["BD"]:
        if settings["decay_s"] > 0.2:
            fall = np.abs(audio[RATE // 10 :][:2000]).max() / np.abs(audio[RATE // 5 :][:2000]).max()
            assert abs(np.log10(fall) * settings["decay_s"] / 0.1 - 1) < 0.1
    for audio, settings in (*drums["CH"], *drums["OH"]):
        first, second = np.array_split(audio[int(0.002 * RATE) :][: int(settings["decay_s"] * RATE)], 2)
        assert abs(10 * np.log10((first @ first) / (second @ second)) - 10) < 1.5


def test_another_rate_is_the_same_sound():
    """But for the scale: the same draws, band-limited. Measured: correlations from 0.999999."""
    for name in circuit_808.VOICES:
        (high, settings), (low, same) = (
            circuit_808.strike(name, np.random.default_rng(5), rate, rate // 4) for rate in (44100, 14700)
        )
        assert settings == same and len(low) == 14700 // 4
        assert np.corrcoef(signal.resample_poly(high, 1, 3), low)[0, 1] > 0.9999, name
    assert np.isfinite(circuit_808.strike("BD", np.random.default_rng(0), 8400, 84)[0]).all()
    for bad in ((7999, 8000), (44100.5, 44100), (44100, 440)):
        with pytest.raises(ValueError, match="of at least 8000 Hz and at least 10 ms of sound, got"):
            circuit_808.strike("BD", np.random.default_rng(0), *bad)


def test_an_item_is_the_same_whatever_the_counts(capsys):
    all_kinds = circuit_808.render_corpus({"BD": 2, "SD": 2, "Tom": 2, "HH": 3}, 3, 8000, 400)
    assert all_kinds.shape == (9, 400) and all_kinds.dtype == np.float32
    some = circuit_808.render_corpus({"HH": 2, "SD": 1}, 3, 8000, 400)
    assert np.array_equal(some, all_kinds[[2, 6, 7]]) and len(np.unique(all_kinds.round(3), axis=0)) == 9
    assert not np.isclose(circuit_808.render_corpus({"SD": 1}, 4, 8000, 400), some[0]).all()
    assert len(circuit_808.corpus_names(data.COUNTS)) == 681  # as the paper's


def test_the_model_is_the_one_of_its_version():
    """When this fails because the model was changed, raise circuit_808.VERSION and measure again."""
    x = circuit_808.render_corpus({"BD": 1, "SD": 1, "Tom": 3, "HH": 2}, 0, 44100, 44100).astype(float)
    measured = [0.04198129, 0.05855964, 0.08542435, 0.1074682, 0.0499689, 0.0471981, 0.02911314]
    assert circuit_808.VERSION == 1 and np.abs(np.sqrt(np.mean(x**2, axis=1)) - measured).max() < 2e-7


# ---- the corpus and its cache: see also test_references.py ---------------------------------------------------------


@pytest.fixture
def rendered(monkeypatch):
    """Lists the counts of every corpus that is rendered."""
    calls, render = [], circuit_808.render_corpus
    monkeypatch.setattr(circuit_808, "render_corpus", lambda *args: calls.append(args) or render(*args))
    return calls


def corpus(cache, **options):
    asked = {"counts": {"BD": 2, "SD": 1, "HH": 2}, "sample_rate_hz": 8000, "n_samples": 400, **options}
    return OneShots.from_circuit(**asked, cache=cache)


@pytest.mark.filterwarnings("error")
def test_a_cached_corpus_is_not_rendered_again(tmp_path, rendered):
    first, second, plain = corpus(tmp_path / "new"), corpus(tmp_path / "new", seed=1), corpus(None)
    assert len(rendered) == 2 and len(list((tmp_path / "new").glob("*.npy"))) == 1
    assert torch.equal(first.x, second.x) and torch.equal(first.x, plain.x) and first.x.shape == (5, 1, 400)
    assert first.source == "circuit-model corpus" and first.kinds == ["BD", "BD", "SD", "HH", "HH"]
    assert first.names == second.names == ["BD 000", "BD 001", "SD 000", "OH 000", "CH 001"]


def test_another_corpus_is_another_file(tmp_path, rendered, monkeypatch):
    for change in ({}, {"corpus_seed": 1}, {"sample_rate_hz": 8820}, {"n_samples": 401}, {"counts": {"BD": 3}}):
        corpus(tmp_path, **change)
    monkeypatch.setattr(circuit_808, "VERSION", 2)
    corpus(tmp_path)
    assert len(rendered) == len(list(tmp_path.glob("*.npy"))) == 6


def test_a_corpus_that_cannot_be_kept_is_used_all_the_same(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert len(corpus(tmp_path / "file" / "cache")) == 5
    assert "cannot be written and is not kept" in capsys.readouterr().err
