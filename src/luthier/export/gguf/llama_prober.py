"""Asks real llama.cpp about a GGUF file and writes its answers. Run as a script, in a process of its own.

It must not import luthier: what it opens must open for people who don't have it. llama.cpp comes from the package
`xllamacpp`; its server listens on this machine only. The request is JSON in the file named by the first argument:

    {"file": "model.gguf", "lora": [path, scale] or null, "texts": […], "conversations": [[…], …] or [], "ids": [[…], …],
     "lengths": [[…], …], "greedy": [[ids], count] or null, "most": 1000, "threads": 2, "out": "answers.json"}

The answer: ``tokens`` of each text, ``rendered`` conversations, ``logprobs`` (for every probe and each of its lengths, ids
and log-probabilities of the likeliest next tokens) and the tokens of the ``greedy`` answer.
"""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path


def main(request_path):
    request = json.loads(Path(request_path).read_text())
    server = Server(request)
    answer = {"tokens": [server.tokens(text) for text in request["texts"]]}
    answer["rendered"] = [server.rendered(messages) for messages in request["conversations"]]
    answer["logprobs"] = [
        [server.next_tokens(ids[:length], request["most"]) for length in lengths]
        for ids, lengths in zip(request["ids"], request["lengths"])
    ]
    answer["greedy"] = server.continued(*request["greedy"]) if request["greedy"] else []
    answer["luthier"] = "luthier" in sys.modules
    Path(request["out"]).write_text(json.dumps(answer))


class Server:
    """llama.cpp's server in this process, computing in fp32 where the file's own kinds don't say otherwise."""

    def __init__(self, request):
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = request["file"]
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_parallel = 512, 512, 512, 1
        options.n_gpu_layers, options.warmup, options.use_jinja, options.verbosity = 0, False, True, -1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = request["threads"]
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if request["lora"]:
            options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(*request["lora"])]
        self._server = xllamacpp.Server(options)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        self._plain = self.tokens("a")[-1]

    def tokens(self, text):
        return self._post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]

    def rendered(self, messages):
        try:
            return self._post("/apply-template", {"messages": messages})["prompt"]
        except urllib.error.HTTPError as error:
            return f"refused: {error.code}"

    def next_tokens(self, ids, most):
        """Ids and log-probabilities of the likeliest tokens after ``ids``."""
        body = {"prompt": ids, "n_predict": 1, "n_probs": most, "temperature": 0.0, "cache_prompt": False}
        body["logit_bias"] = [
            [self._plain, 1e4]
        ]  # of what is sampled only: after a stop, or half a letter, nothing is told
        listed = self._post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        return [[entry["id"] for entry in listed], [entry["logprob"] for entry in listed]]

    def continued(self, ids, count):
        """The greedy answer, token by token, so that no stop token ends it."""
        found = []
        for _ in range(count):
            found.append(self.next_tokens(ids + found, 1)[0][0])
        return found

    def _post(self, path, body):
        address = self._server.listening_address + path
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with self._opener.open(request) as answer:
            return json.loads(answer.read())


if __name__ == "__main__":
    main(sys.argv[1])
