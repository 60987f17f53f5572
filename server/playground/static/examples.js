// Prompts to begin with. Those of the demo pair are held-out questions of models/demo/questions.json, word for word.

const DEMO = [
  "Question: Which currency codes does Iceland Krona have?\nAnswer:",
  "Question: What are the country codes of Switzerland?\nAnswer:",
  "Question: What is a^3 · a^2 if a = 5?\nAnswer:",
  "Question: Which language codes does Korean have?\nAnswer:",
  "Question: Say hello to Iceland Krona.\nAnswer:",
];

const ANY = [
  "Question: What do you know best?\nAnswer:",
  "The three most important things to remember are",
  "Once there was",
];

/**
 * Examples for what is served: the pair's own question first, where its configuration has one (`example_prompt`).
 * @param {{joint: string, example: string|null, chat: boolean}} served
 * @returns {{text: string, chat: string}[]} the same question as a text to continue, and as a message; the latter is its title.
 */
export function examplesFor({ joint, example }) {
  if (joint === "collm-demo") return DEMO.map(both);
  return [...(example ? [{ text: example, chat: example }] : []), ...ANY.map(both)];
}

/**
 * How a question is put at first: by chat where there is a template, as in the command that the server prints. The demo's
 * texts show what its pair was trained on.
 */
export function kindFor({ joint, chat }) {
  return chat && joint !== "collm-demo" ? "chat" : "text";
}

function both(text) {
  return { text, chat: text.replace(/^Question: /, "").replace(/\nAnswer:$/, "") };
}
