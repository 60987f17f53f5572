// Building elements. Text only ever goes in as text: nothing that a model or a server sends is parsed as HTML.

/** The element with an id that stands in the page. */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * A new element.
 * @param {string} tag
 * @param {Record<string, unknown>} properties "class", "data-..." and "aria-..." and "role" become attributes.
 * @param {...(Node|string|null)} children
 */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "class" || name === "role" || name === "for" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/**
 * Copy a text; where there is no clipboard (a page that came over plain http from another machine) select the element that
 * shows it, for Ctrl+C.
 * @returns {Promise<boolean>} whether it was copied
 */
async function copyText(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}

/** Copy a text at the click of a button, which says for a moment what became of it. */
export async function copyFrom(button, text, element, otherwise = "Selected") {
  button.dataset.label ??= button.textContent;
  button.textContent = (await copyText(text, element)) ? "Copied" : otherwise;
  setTimeout(() => (button.textContent = button.dataset.label), 1500);
}

/** A number in an input, or null where it is empty. */
export function valueOf(input) {
  return input.value.trim() === "" ? null : Number(input.value);
}
