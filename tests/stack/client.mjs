// OpenAI's client for Node against the gateway: `node tests/stack/client.mjs URL GUARDED_URL MODEL` prints what it got.
import OpenAI from "openai";

const [url, guarded, model] = process.argv.slice(2);
const made = (base, apiKey) => new OpenAI({ baseURL: `${base}/v1`, apiKey, maxRetries: 0, timeout: 300_000 });
const client = made(url, "node-client");

const user = (content) => [{ role: "user", content }];
const still = { temperature: 0, seed: 1 };
const colours = {
  type: "object",
  properties: { colour: { enum: ["blue", "green", "red"] } },
  required: ["colour"],
  additionalProperties: false,
};
const paint = { type: "function", function: { name: "paint", parameters: colours, strict: true } };

async function joined(stream, piece) {
  let text = "";
  for await (const chunk of stream) text += piece(chunk) ?? "";
  return text;
}

async function statusOf(promise) {
  try {
    await promise;
    return 200;
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return error.status;
  }
}

const chat = (body) => client.chat.completions.create({ model, max_tokens: 8, ...still, ...body });
const told = {};

told.models = [];
for await (const each of client.models.list()) told.models.push(each.id);

const hello = { messages: user("Say hello to the sea.") };
const whole = await chat(hello);
told.chat = whole.choices[0].message.content;
told.usage = whole.usage.total_tokens;
told.chat_stream = await joined(await chat({ ...hello, stream: true }), (chunk) => chunk.choices[0]?.delta.content);

const tools = { messages: user("Paint the wall blue."), tools: [paint], tool_choice: "required" };
const called = { ...tools, parallel_tool_calls: false, max_tokens: 64 };
told.tool = (await chat(called)).choices[0].message.tool_calls[0].function.arguments;
told.tool_stream = await joined(
  await chat({ ...called, stream: true }),
  (chunk) => chunk.choices[0]?.delta.tool_calls?.map((call) => call.function.arguments ?? "").join(""),
);

const format = { type: "json_schema", json_schema: { name: "colours", schema: colours, strict: true } };
const grass = user("What colour is grass? Answer as JSON.");
told.schema = (await chat({ messages: grass, response_format: format, max_tokens: 48 })).choices[0].message.content;

const counted = await chat({ messages: user("Count to ten."), logprobs: true, top_logprobs: 2, max_tokens: 4 });
told.logprobs = counted.choices[0].logprobs.content.length;
const rivers = await chat({ messages: user("Name a river."), n: 2, temperature: 0.8, max_tokens: 4 });
told.n = rivers.choices.map((choice) => choice.index);

const prompt = { model, prompt: "The capital of Norway is", max_tokens: 8, ...still };
told.completion = (await client.completions.create(prompt)).choices[0].text;
const texts = await client.completions.create({ ...prompt, stream: true });
told.completion_stream = await joined(texts, (chunk) => chunk.choices[0]?.text);

const input = { model, input: "Say hello.", max_output_tokens: 8, temperature: 0 };
told.response = (await client.responses.create(input)).output_text;
told.response_stream = await joined(await client.responses.create({ ...input, stream: true }), (event) =>
  event.type === "response.output_text.delta" ? event.delta : "",
);

const embedded = await client.embeddings.create({ model: "embedder", input: ["a river", "a lake"] });
told.embedding = [embedded.data.length, embedded.data[0].embedding.length];

const hi = { messages: user("Hi"), max_tokens: 4 };
const asking = (key, name) => made(guarded, key).chat.completions.create({ model: name, ...hi });
told.errors = {
  unknown: await statusOf(chat({ model: "gpt-17", ...hi })),
  empty: await statusOf(chat({ messages: [] })),
  vllm: await statusOf(chat({ ...hi, temperature: -3 })),
  key: await statusOf(asking("key-none", "auto")),
  down: await statusOf(asking("key-all", "smollm2-large")),
};
console.log(JSON.stringify(told));
