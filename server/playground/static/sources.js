// How the writers of tokens look and are named: the base plain, each expert with a tint, an underline and a letter.

export const STYLES = 4; // of experts, in style.css; a fifth looks like the first again, but for its letter

/** Which of the styles a source has: "base", "blend", or "expert-1" and so on. */
export function styleOf(source, experts) {
  const number = experts.indexOf(source);
  if (number >= 0) return `expert-${(number % STYLES) + 1}`;
  return source === "blend" ? "blend" : "base";
}

/** The letter that stands where an expert begins to write: "A" for the first expert; "" for the base. */
export function letterOf(source, experts) {
  const number = experts.indexOf(source);
  if (number < 0) return "";
  return number < 26 ? String.fromCharCode(65 + number) : String(number + 1);
}

/** How a token is spoken of: quoted, with what cannot be seen made visible. */
export function quoted(text) {
  return `“${text.replaceAll("\n", "↵").replaceAll(" ", "␣")}”`;
}
