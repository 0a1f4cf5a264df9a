// llama.cpp's token ids: reads {"model": path, "texts": [...]} from stdin, writes {"plain": [[...]], "special": [[...]]}.
// "plain": control tokens in a text stay text; "special": they are parsed. Nothing is added in front.
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const { model: modelPath, texts } = JSON.parse(Buffer.concat(chunks).toString("utf8"));

const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath, vocabOnly: true });
const ids = (text, special) => model.tokenize(text, special).map(Number);
const answer = { plain: texts.map((text) => ids(text, false)), special: texts.map((text) => ids(text, true)) };
process.stdout.write(JSON.stringify(answer), () => process.exit(0));
