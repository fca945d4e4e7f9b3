// Answers with what the hub's own parsers read. One JSON value on stdin: {"names": [...], "files": [...]}; one on stdout:
// "labels" of the names, the "types" that the hub knows, and for each file its metadata and tensors.
import { gguf } from "@huggingface/gguf";
import { GGMLFileQuantizationType, parseGGUFQuantLabel } from "@huggingface/tasks";

let asked = "";
for await (const part of process.stdin) asked += part;
const { names, files } = JSON.parse(asked);

const plain = (value) => (typeof value === "bigint" ? Number(value) : Array.isArray(value) ? value.slice(0, 8).map(plain) : value);
const read = async (path) => {
  const { metadata, tensorInfos } = await gguf(path, { allowLocalFile: true });
  return {
    metadata: Object.fromEntries(Object.entries(metadata).map(([key, value]) => [key, plain(value)])),
    tensors: Object.fromEntries(tensorInfos.map((tensor) => [tensor.name, { type: tensor.dtype, shape: tensor.shape.map(Number) }])),
  };
};

console.log(
  JSON.stringify({
    labels: names.map((name) => parseGGUFQuantLabel(name) ?? ""),
    types: Object.fromEntries(Object.entries(GGMLFileQuantizationType).filter(([, value]) => typeof value === "number")),
    files: await Promise.all(files.map(read)),
  }),
);
