// The API reference: openapi.json as a page.

import { request } from "./api.js";
import { byId, el } from "./dom.js";
import { authorization, savedKey, saveKey } from "./key.js";
import { tryOut } from "./try.js";

const REF = "#/components/schemas/";

async function load() {
  const key = typedKey();
  let response;
  try {
    response = await request("openapi.json", { headers: authorization(key) });
  } catch (error) {
    return complain(error.message);
  }
  if (response.status === 401) {
    saveKey("");
    byId("key-form").hidden = false;
    byId("openapi").hidden = true; // an address that is opened by a click is sent without a key
    byId("key").focus();
    return complain(key ? "The server does not take this API key." : "This server asks for an API key.");
  }
  if (!response.ok) return complain(`The server answered ${response.status}.`);
  saveKey(key);
  byId("openapi").hidden = key !== "";
  byId("notice").hidden = true;
  byId("key-form").hidden = true;
  show(await response.json());
}

function typedKey() {
  return byId("key").value.trim();
}

function complain(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = false;
}

function show(api) {
  byId("version").textContent = `API reference · version ${api.info.version}`;
  const groups = new Map();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const group = operation.tags?.[0] ?? "other";
      groups.set(group, [...(groups.get(group) ?? []), { path, method: method.toUpperCase(), operation }]);
    }
  }
  const contents = [];
  const routes = [el("p", {}, ...prose(api.info.description ?? ""))];
  for (const [group, found] of groups) {
    contents.push(el("h2", {}, group[0].toUpperCase() + group.slice(1)));
    for (const one of found) {
      const id = one.operation.operationId;
      contents.push(el("a", { href: `#${id}` }, `${one.method} ${one.path}`));
      routes.push(route(id, one, api));
    }
  }
  byId("contents").replaceChildren(...contents);
  byId("routes").replaceChildren(...routes);
  if (location.hash.length > 1) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

function route(id, { path, method, operation }, api) {
  const section = el(
    "section",
    { class: "route", id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, el("span", { class: "method" }, method), path),
    ...paragraphs(operation.description ?? operation.summary ?? ""),
  );
  const parameters = operation.parameters ?? [];
  if (parameters.length) {
    section.append(
      el("h3", {}, "Parameters"),
      table(parameters.map((each) => [each.name, kind(each.schema), each.description ?? `In the ${each.in}.`, each.required])),
    );
  }
  const body = operation.requestBody?.content?.["application/json"];
  if (body) {
    section.append(el("h3", {}, "Request"));
    if (body.example) section.append(el("pre", { class: "example", tabIndex: 0, role: "group", "aria-label": "Example" }, JSON.stringify(body.example, null, 2)));
    section.append(...fields(body.schema, api, new Set(), true));
  }
  const answer = operation.responses?.["200"]?.content ?? {};
  if (answer["application/json"]?.schema) {
    section.append(el("h3", {}, "Response"), ...fields(answer["application/json"].schema, api, new Set()));
  }
  section.append(
    el("h3", {}, "Statuses"),
    el(
      "dl",
      { class: "statuses" },
      ...Object.entries(operation.responses ?? {}).flatMap(([status, { description }]) => [
        el("dt", {}, status),
        el("dd", {}, ...prose(description ?? "")),
      ]),
    ),
    tryOut(id, method, path, { parameters, example: body?.example }, typedKey),
  );
  return section;
}

/** A table of a schema's fields, and one for each object in it, folded. */
function fields(reference, api, above, asked = false) {
  const name = reference.$ref?.slice(REF.length);
  const schema = name ? api.components.schemas[name] : reference;
  if (!schema?.properties || above.has(name)) return [];
  const inner = new Set([...above, name]);
  const rows = [];
  const nested = [];
  const unsupported = [];
  for (const [field, value] of asked ? inOrder(schema) : Object.entries(schema.properties)) {
    if (value.type === "null") {
      unsupported.push(field);
      continue;
    }
    rows.push([field, kind(value), describe(value), asked && (schema.required ?? []).includes(field)]);
    for (const ref of references(value)) nested.push([field, ref]);
  }
  const parts = [table(rows)];
  if (unsupported.length) {
    parts.push(el("p", { class: "hint" }, `Refused with 400 unless null: ${unsupported.join(", ")}.`));
  }
  for (const [field, ref] of nested) {
    const content = fields({ $ref: ref }, api, inner, asked);
    if (content.length) {
      parts.push(el("details", { class: "nested" }, el("summary", {}, el("code", {}, field), ` ${summaryOf(ref, api)}`), ...content));
    }
  }
  return parts;
}

/** The fields of a request: the required ones first, then what this server adds to OpenAI's, then the others. */
function inOrder({ properties, required = [] }) {
  const rank = (field) => (required.includes(field) ? 0 : ["prompt", "collaboration"].includes(field) ? 1 : 2);
  return Object.entries(properties).sort(([a], [b]) => rank(a) - rank(b));
}

function summaryOf(ref, api) {
  return (api.components.schemas[ref.slice(REF.length)]?.description ?? "").replaceAll("``", "");
}

function references(value) {
  if (value.$ref) return [value.$ref];
  return [...(value.anyOf ?? []), ...(value.allOf ?? []), value.items].filter(Boolean).flatMap(references);
}

function table(rows) {
  const headings = rows.some((row) => row[2]) ? ["Field", "Type", "Meaning"] : ["Field", "Type"];
  return el(
    "div",
    { class: "table", tabIndex: 0, role: "group", "aria-label": "Fields" },
    el(
      "table",
      { class: "schema" },
      el("thead", {}, el("tr", {}, ...headings.map((name) => el("th", { scope: "col" }, name)))),
      el(
        "tbody",
        {},
        ...rows.map(([name, type, text, required]) =>
          el(
            "tr",
            {},
            el("td", {}, name, required ? el("span", { class: "required" }, "required") : null),
            el("td", {}, type),
            headings.length > 2 ? el("td", {}, ...prose(text)) : null,
          ),
        ),
      ),
    ),
  );
}

/** A type in a few words: `integer 0 to 5`, `string or array of string`. */
function kind(value) {
  if (value === undefined) return "";
  if (value.$ref) return "object";
  const choices = value.anyOf ?? value.oneOf ?? value.allOf;
  if (choices) return [...new Set(choices.filter((each) => each.type !== "null").map(kind))].join(" or ");
  if (value.enum) return value.enum.map((each) => JSON.stringify(each)).join(", ");
  if (value.const !== undefined) return JSON.stringify(value.const);
  if (value.type === "array") return `array of ${value.items ? kind(value.items) : "anything"}`;
  const low = value.exclusiveMinimum !== undefined ? `> ${value.exclusiveMinimum}` : value.minimum;
  const high = value.maximum > 1e9 ? undefined : value.maximum;
  if (low === undefined || Math.abs(low) > 1e15) return String(value.type ?? "");
  return high === undefined ? `${value.type} ${value.exclusiveMinimum === undefined ? "≥ " : ""}${low}` : `${value.type} ${low} to ${high}`;
}

function describe(value) {
  return value.description ?? "";
}

function paragraphs(text) {
  return text.split(/\n\s*\n/).map((each) => el("p", {}, ...prose(each)));
}

/** Text in which `words` and ``words`` between backticks are code. */
function prose(text) {
  return text.split(/``([^`]+)``|`([^`]+)`/).flatMap((part, i) => {
    if (part === undefined || part === "") return [];
    return i % 3 === 0 ? [part] : [el("code", {}, part)];
  });
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  load();
});

byId("key").value = savedKey();
load();
