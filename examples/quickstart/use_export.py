"""Load an export with transformers alone and continue a prompt; prints one JSON object.

python examples/quickstart/use_export.py --model runs/export --prompt "import"
"""

import argparse
import json

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--prompt", required=True)
parser.add_argument("--max-new-tokens", type=int, default=40)
arguments = parser.parse_args()
disable_progress_bar()

tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True).eval()
inputs = tokenizer(arguments.prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
print(json.dumps({"tokens": tokens, "text": tokenizer.decode(tokens, skip_special_tokens=True)}))
