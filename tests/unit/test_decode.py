"""Decoders: formats, damage, closeness to what Hugging Face's SigLIP processor sees, and DALI beside torch."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_infimed import optional
from megatron_infimed.data.decode import GRAY, TorchDecoder, decode_rgb, make_decoder
from megatron_infimed.errors import UserError
from tests.tiny import tiny_images


def encode(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(height=97, width=131, seed=0):
    """A smooth gradient with some noise, as photographs are."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[0:height, 0:width]
    channels = [127 + 90 * np.sin(xx / (9 + c) + yy / 17 + c) + rng.normal(0, 6, (height, width)) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def reference(data, size):
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def difference(a, b):
    return (a.int() - b.int()).abs()


@pytest.fixture(scope="module")
def dali():
    pytest.importorskip("nvidia.dali")
    decoder = make_decoder("dali", threads=2, device="cpu")
    yield decoder
    decoder.close()


@pytest.fixture
def torch_decoder():
    decoder = TorchDecoder(threads=2)
    yield decoder
    decoder.close()


@pytest.mark.parametrize("size", [56, 224, 384])
def test_torch_is_near_pillow(torch_decoder, size):
    images = [encode(picture(*shape, seed=i), quality=92) for i, shape in enumerate([(97, 131), (384, 384), (600, 431), (30, 20)])]
    images += [encode(picture(200, 100), "PNG"), encode(picture().convert("L")), encode(picture(), progressive=True)]
    pixels, corrupt = torch_decoder(images, size)
    assert pixels.shape == (len(images), 3, size, size) and pixels.dtype == torch.uint8 and corrupt == []
    for data, got in zip(images, pixels, strict=True):
        assert difference(got, reference(data, size)).max() <= 2  # worst seen: 2, mean 0.25


def test_torch_is_near_the_siglip_processor(torch_decoder):
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    processor = siglip.SiglipImageProcessorPil(size={"height": 384, "width": 384})
    images = [encode(picture(300, 200, seed=i)) for i in range(3)]
    want = processor([Image.open(io.BytesIO(d)) for d in images], return_tensors="pt")["pixel_values"]
    got = torch_decoder(images, 384).pixels
    assert difference(got, ((want * 0.5 + 0.5) * 255).round()).max() <= 2  # worst seen: 2, mean 0.25


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("BMP", {}), ("PPM", {}), ("PNG", {})])
def test_other_formats(torch_decoder, kind, options):
    image = picture().convert("P") if kind == "GIF" else picture()
    pixels, corrupt = torch_decoder([encode(image, kind, **options)], 64)
    assert corrupt == [] and difference(pixels[0], reference(encode(image, kind, **options), 64)).max() <= 2  # worst seen: 2, mean 0.25


def test_cmyk_is_decoded_by_pillow():
    data = encode(picture().convert("CMYK"))
    assert np.array_equal(decode_rgb(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_honoured(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode_rgb(encode(picture(40, 80), quality=95, exif=exif))
    assert turned.shape == ((80, 40, 3) if orientation in (6, 8) else (40, 80, 3))
    plain = decode_rgb(encode(picture(40, 80), quality=95))
    assert np.array_equal(turned, np.rot90(plain, {1: 0, 3: 2, 6: -1, 8: 1}[orientation]))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_deep_gray_uses_the_bits_that_are_there(bits):
    values = np.linspace(0, 2**bits - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    rgb = decode_rgb(encode(Image.fromarray(values), "PNG"))
    assert rgb.min() == 0 and rgb.max() == 255 and np.all(np.diff(rgb[..., 0].ravel().astype(int)) >= 0)


def test_floating_point_is_stretched():
    rgb = decode_rgb(encode(Image.fromarray(np.linspace(-3, 5, 400, dtype=np.float32).reshape(20, 20)), "TIFF"))
    assert rgb.min() == 0 and rgb.max() == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode):
    image = Image.new("RGBA", (20, 20), (10, 20, 30, 0))
    image.paste((200, 0, 0, 255), (0, 0, 10, 20))
    data = encode(image.quantize() if mode == "P" else image.convert(mode), "PNG")
    rgb = decode_rgb(data)
    assert (rgb[:, 12:] == 255).all() and not (rgb[:, :8] == 255).all()


def damaged():
    good = encode(picture(300, 300))
    png = encode(picture(), "PNG")
    return [good[: len(good) // 2], good[:30], b"", b"no image", png[:200], good[:2] + b"\0" * 500]


def test_damaged_images_are_gray_and_reported(torch_decoder):
    good = tiny_images(3)
    pixels, corrupt = torch_decoder([good[0], *damaged(), good[1], good[2]], 32)
    assert corrupt == list(range(1, 7))
    assert (pixels[1:7] == GRAY).all()
    assert torch.equal(pixels[[0, 7, 8]], torch_decoder(good, 32).pixels)


def test_no_images(torch_decoder, dali):
    for decoder in (torch_decoder, dali):
        pixels, corrupt = decoder([], 48)
        assert pixels.shape == (0, 3, 48, 48) and corrupt == []


def test_one_thread_or_more_is_the_same():
    images = tiny_images(8)
    one, four = TorchDecoder(1), TorchDecoder(4)
    assert torch.equal(one(images, 40).pixels, four(images, 40).pixels)
    four.close()


def test_dali_is_close_to_pillow_at_every_size(dali):
    # worst case seen: max 9, mean 0.10 (JPEG and PNG; 384, 56, 224, 384 through one pipeline)
    images = [encode(picture(*shape, seed=i), quality=92) for i, shape in enumerate([(97, 131), (384, 384), (600, 431), (90, 80)])]
    images += [encode(picture(200, 100), "PNG"), encode(picture().convert("L")), encode(picture().convert("L"), "PNG")]
    for size in (384, 56, 224, 384):
        pixels, corrupt = dali(images, size)
        assert pixels.shape == (len(images), 3, size, size) and corrupt == []
        off = torch.stack([difference(got, reference(data, size)) for data, got in zip(images, pixels, strict=True)])
        assert off.max() <= 12 and off.float().mean() <= 0.2


def test_dali_and_torch_agree_on_what_only_torch_reads(dali, torch_decoder):
    images = [
        encode(picture().convert("P"), "GIF"),
        encode(picture().convert("RGBA"), "PNG"),
        encode(picture().quantize(), "PNG"),
        encode(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)), "PNG"),
        encode(picture(), "WEBP"),
    ]
    assert torch.equal(dali(images, 64).pixels, torch_decoder(images, 64).pixels)


def test_dali_survives_damage_and_leaves_neighbours_alone(dali):
    good = [encode(picture(120, 90, seed=i)) for i in range(9)]
    want = dali(good, 64).pixels
    bad = damaged()
    mixed = [x for pair in zip(good, [*bad, *bad[:3]], strict=True) for x in pair]
    pixels, corrupt = dali(mixed, 64)
    assert corrupt == list(range(1, 18, 2))
    assert (pixels[1::2] == GRAY).all() and torch.equal(pixels[::2], want)
    assert torch.equal(dali(good, 64).pixels, want)


def test_dali_takes_more_images_than_its_batch(torch_decoder):
    pytest.importorskip("nvidia.dali")
    from megatron_infimed.data.dali import DaliDecoder

    small, images = DaliDecoder(1, "cpu", max_batch=2), [encode(picture(60, 70, seed=i)) for i in range(5)]
    assert difference(small(images, 32).pixels, torch_decoder(images, 32).pixels).max() <= 12


@pytest.mark.gpu
def test_dali_on_the_gpu_is_close_to_pillow_and_survives_damage():
    pytest.importorskip("nvidia.dali")
    decoder = make_decoder("auto", threads=2, device="cuda")
    images = [encode(picture(300 + 10 * i, 400, seed=i), quality=92) for i in range(6)]
    for size in (384, 224):
        pixels, corrupt = decoder([*images, images[0][:40]], size)
        assert pixels.is_cuda and corrupt == [6] and (pixels[6] == GRAY).all()
        off = torch.stack([difference(got.cpu(), reference(data, size)) for data, got in zip(images, pixels, strict=False)])
        assert off.float().mean() <= 0.5
    decoder.close()


def test_dali_honours_exif(dali):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(40, 80), quality=95, exif=exif)
    assert difference(dali([data], 40).pixels, TorchDecoder(1)([data], 40).pixels).max() <= 12


def test_make_decoder(monkeypatch):
    assert isinstance(make_decoder("auto", 1, "cpu"), TorchDecoder)
    monkeypatch.setattr(optional, "available", lambda package: False)
    with pytest.raises(UserError, match=r"pip install -e .\[dali\]"):
        make_decoder("dali", 1, "cpu")
