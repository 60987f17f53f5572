// Talking to the server: models, defaults, and streams of tokens. Addresses are relative to the page, so that the page
// works behind a proxy that serves it under a prefix.

import { authorization } from "./key.js";

/** The server's error object, or no server at all. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
  }
}

export function address(path) {
  return new URL(path, document.baseURI).href;
}

/**
 * The response, of whatever status.
 * @throws {ApiError} the server cannot be reached.
 */
export async function request(path, options, signal) {
  try {
    return await fetch(address(path), { ...options, signal, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
}

async function send(path, options, signal) {
  const response = await request(path, options, signal);
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let detail = null;
  try {
    detail = (await response.json()).error;
  } catch {
    // No JSON: some proxy answered.
  }
  const message = detail?.message ?? `The server answered ${response.status}.`;
  return new ApiError(message, { status: response.status, code: detail?.code ?? null, param: detail?.param ?? null });
}

/**
 * What is served: the joint model, its members, and how they share the work unless a request says otherwise.
 * @returns {Promise<{joint: string, members: {id: string, name: string}[], blended: string[], collaboration: {policy: string,
 *   policies: string[], thresholds: Object<string, number>, gate: boolean, experts: string[], blends: string[]}, example: string|null,
 *   chat: boolean}>}
 */
export async function models(key) {
  const { data } = await (await send("v1/models", { headers: authorization(key) })).json();
  const joint = data.find((model) => model.parent === null);
  if (!joint) throw new ApiError("The server names no joint model.");
  const { collaboration, example_prompt: example, chat } = joint;
  if (!collaboration) throw new ApiError("The engine is starting.");
  const members = ["base", ...collaboration.experts].map((name) => ({ id: `${joint.id}/${name}`, name }));
  // Blends under names of their own.
  const blended = data.map((model) => model.id).filter((id) => id !== joint.id && members.every((member) => member.id !== id));
  return { joint: joint.id, members, blended, collaboration, example, chat };
}

/** Whether requests are admitted; the reason if not. */
export async function readiness() {
  try {
    await send("ready", {});
    return { ready: true };
  } catch (error) {
    return { ready: false, reason: error.message };
  }
}

/** Where a body belongs. */
export function route(body) {
  return "messages" in body ? "v1/chat/completions" : "v1/completions";
}

/**
 * Streams an answer, of a completion or of a chat. A token's `id` and `logprob` are known where the request asked for
 * `return_token_ids` and for logprobs.
 * @yields {{tokens: Token[], prompt: number[]|null, finish: string|null}} `prompt` are the ids of the prompt's tokens, once.
 */
export async function* answer(body, key, signal) {
  const response = await send(route(body), posted(body, key), signal);
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { ...chunk.error, status: 500 });
    for (const choice of chunk.choices) {
      finished ||= choice.finish_reason !== null;
      yield {
        tokens: tokensOf(choice),
        prompt: choice.prompt_token_ids ?? chunk.prompt_token_ids ?? null,
        finish: choice.finish_reason,
      };
    }
  }
  if (!finished) throw new ApiError("The connection ended before the answer did.");
}

/** A whole answer's first choice, as the server sends it. */
export async function complete(body, key, signal) {
  const { choices } = await (await send(route(body), posted(body, key), signal)).json();
  return choices[0];
}

/**
 * @typedef {{text: string, source: string, p: number|null, id: number|undefined, logprob: number|null,
 *   support: Object<string, number>|null, check: boolean|null, sure: {base: number|null, expert: number|null},
 *   vetoed: boolean, regretted: boolean}} Token `check`: it deserves a second look; null where the server does not say
 * @returns {Token[]}
 */
export function tokensOf(choice) {
  const report = choice.collaboration;
  const { tokens, sources, deferral_probabilities: values, support } = report;
  const logprobs = choice.logprobs?.token_logprobs ?? choice.logprobs?.content?.map((each) => each.logprob);
  return tokens.map((text, i) => ({
    text,
    source: sources[i],
    p: values[i],
    id: choice.token_ids?.[i],
    logprob: logprobs?.[i] ?? null,
    support: support?.[i] ?? null,
    check: report.check?.[i] ?? null,
    sure: { base: report.base_confidences?.[i] ?? null, expert: report.expert_confidences?.[i] ?? null },
    vetoed: report.vetoed?.[i] ?? false,
    regretted: report.regretted?.[i] ?? false,
  }));
}

function posted(body, key) {
  return {
    method: "POST",
    headers: { "Content-Type": "application/json", ...authorization(key) },
    body: JSON.stringify(body),
  };
}

/** The data of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split(/\r?\n\r?\n/);
      buffer = parts.pop();
      for (const part of parts) {
        const data = part
          .split(/\r?\n/)
          .filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
