// The request as a command and as programs. A key never goes into any: they take it from the environment.

import { address, route } from "./api.js";
import { byId } from "./dom.js";

export const LANGUAGES = ["curl", "python", "javascript"];

/** Fill the tabs with the code of a request. */
export function showCode(body, withKey) {
  byId("code-curl").textContent = asCurl(address(route(body)), body, withKey);
  byId("code-python").textContent = asPython(address("v1"), body, withKey);
  byId("code-javascript").textContent = asJavaScript(address("v1"), body, withKey);
}

/** A string for a POSIX shell. */
function shell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A JSON value as a Python literal. */
function python(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    const items = Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each)}`);
    return `{${items.join(", ")}}`;
  }
  return JSON.stringify(value);
}

/** A curl command that prints the stream. */
function asCurl(url, body, withKey) {
  const lines = [`curl -N ${shell(url)}`, `-H 'Content-Type: application/json'`];
  if (withKey) lines.push(`-H "Authorization: Bearer $COLLM_API_KEY"`);
  lines.push(`-d ${shell(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

/** A program for OpenAI's SDK. */
function asPython(base, body, withKey) {
  const { collaboration, ...standard } = body;
  const fields = Object.entries(standard).map(([name, value]) => `    ${name}=${python(value)},`);
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${python(base)}, api_key=${withKey ? 'os.environ["COLLM_API_KEY"]' : '"none"'})`,
    `stream = client.${"messages" in body ? "chat.completions" : "completions"}.create(`,
    ...fields,
    `    extra_body={"collaboration": ${python(collaboration)}},`,
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    "        report = choice.collaboration",
    '        for text, source in zip(report["tokens"], report["sources"]):',
    '            print(f"{source:>8}  {text!r}")',
    "",
  ].join("\n");
}

/** A program for OpenAI's SDK in JavaScript (npm install openai; node request.mjs). */
function asJavaScript(base, body, withKey) {
  return [
    `import OpenAI from "openai";`,
    "",
    `const client = new OpenAI({ baseURL: ${JSON.stringify(base)}, apiKey: ${withKey ? "process.env.COLLM_API_KEY" : '"none"'} });`,
    `const stream = await client.${"messages" in body ? "chat.completions" : "completions"}.create(${JSON.stringify(body, null, 2)});`,
    "for await (const chunk of stream) {",
    "  for (const choice of chunk.choices) {",
    "    const { tokens, sources } = choice.collaboration;",
    "    tokens.forEach((text, i) => console.log(sources[i].padStart(8), JSON.stringify(text)));",
    "  }",
    "}",
    "",
  ].join("\n");
}
