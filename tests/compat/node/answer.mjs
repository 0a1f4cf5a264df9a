// llama.cpp's answers: reads {"model", "lora", "prompts", "maxTokens", "stop", "vocabSize"} from stdin and writes
// {"greedy": [[...]], "probabilities": [[...]]}: for each prompt (token ids) the tokens that follow it, the most
// probable one each time, and the probability of every token to be the first of them.
// One thread: llama.cpp's wait for each other by spinning, which takes minutes where processors are shared.
import { getLlama, LlamaLogLevel } from "node-llama-cpp";

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const ask = JSON.parse(Buffer.concat(chunks).toString("utf8"));

const llama = await getLlama({ gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1 });
const model = await llama.loadModel({ modelPath: ask.model });
const lora = ask.lora ? { adapters: [{ filePath: ask.lora }] } : undefined;
const context = await model.createContext({ contextSize: 512, lora, threads: 1 });
const sequence = context.getSequence();
const everything = { temperature: 1, topK: 0, topP: 1, minP: 0 };

async function probabilitiesAfter(prompt) {
    await sequence.clearHistory();
    const last = [prompt.at(-1), { generateNext: { probabilities: true, options: everything } }];
    const evaluated = await sequence.controlledEvaluate([...prompt.slice(0, -1), last]);
    const next = new Array(ask.vocabSize).fill(0);
    for (const [token, probability] of evaluated.at(-1).next.probabilities) next[token] = probability;
    return next;
}

async function greedyAfter(prompt) {
    await sequence.clearHistory();
    const tokens = [];
    if (ask.maxTokens === 0) return tokens;
    for await (const token of sequence.evaluate(prompt, { temperature: 0 })) {
        if (ask.stop.includes(token)) break;
        if (tokens.push(token) >= ask.maxTokens) break;
    }
    return tokens;
}

const greedy = [], probabilities = [];
for (const prompt of ask.prompts) {
    probabilities.push(await probabilitiesAfter(prompt));
    greedy.push(await greedyAfter(prompt));
}
process.stdout.write(JSON.stringify({ greedy, probabilities }), () => process.exit(0));
