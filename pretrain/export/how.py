"""How a user loads an export: lines of its model card."""

OPEN_CLIP = """\
### open_clip (3.0 or newer)
```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH_OF_THIS_FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:PATH_OF_THIS_FOLDER")
model.eval()
image_features = model.encode_image(preprocess(image).unsqueeze(0), normalize=True)
text_features = model.encode_text(tokenizer(["a photo of a dog."]), normalize=True)
```
"""
TRANSFORMERS = """\
### transformers
```python
from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained("PATH_OF_THIS_FOLDER")
processor = CLIPProcessor.from_pretrained("PATH_OF_THIS_FOLDER")
inputs = processor(text=["a photo of a dog."], images=image, return_tensors="pt", padding=True, truncation=True)
logits_per_image = model(**inputs).logits_per_image
```
It resizes images with slightly other rounding than open_clip. For raw captions trust open_clip: see awkward inputs.
"""
TIMM_CLASSIFIER = """\
### timm
```python
import timm
model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
probabilities = model(transform(image.convert("RGB")).unsqueeze(0)).softmax(dim=1)
```
"""
TRANSFORMERS_CLASSIFIER = """\
### transformers (5.0 or newer, with timm and torchvision)
```python
from transformers import pipeline
classify = pipeline("image-classification", model="PATH_OF_THIS_FOLDER")
print(classify(image))
```
`AutoModelForImageClassification` and `AutoImageProcessor` load it as well. One layer more than the tower has divides
the features by their length, as training does: it holds numbers up to 1e10, so run it in fp32 or bf16, not in fp16.
"""
PICTURES = """\
Training and evaluation see a picture upright, in 8-bit RGB as Pillow's `convert("RGB")` gives it (alpha is dropped,
palettes are looked up) but for 16-bit grey, which is scaled where `convert` clips it, and only then resize it. The
clients do some of this in another way, or leave it to their callers. Made ready so, every picture is the same to all:
```python
import numpy as np
from PIL import Image, ImageOps
image = ImageOps.exif_transpose(Image.open(path))
if image.mode.startswith("I"):
    image = Image.fromarray(((np.asarray(image).astype(int) + 128) // 257).astype(np.uint8))
image = image.convert("RGBA").convert("RGB")
```

"""
TEXTS = """\
Training and evaluation clean a caption as open_clip's tokenizer does; transformers' does not. Trust open_clip for raw
captions; for transformers (and what builds on it) clean them first:
```python
import ftfy, html
text = html.unescape(html.unescape(ftfy.fix_text(text)))
```
Neither client is to be trusted with captions that spell out a special token (`<end_of_text>` to
open_clip and the trainer, `<|endoftext|>` to transformers): what stands behind it is lost.

"""
