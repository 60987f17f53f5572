// What the form held when its page went away: in this tab's session storage, so that a reload, a look at the API reference
// or a step back in the browser lose nothing. Never the key.

const NAME = "collm-playground";

/** Keep settings. */
export function keep(settings) {
  try {
    sessionStorage.setItem(NAME, JSON.stringify(settings));
  } catch {
    // More than the browser stores.
  }
}

/** The settings that were kept, or null. */
export function kept() {
  const settings = JSON.parse(sessionStorage.getItem(NAME));
  return settings !== null && typeof settings === "object" ? settings : null;
}

/** Whether this page was shown before: what was done there is newer than what its address says. */
export function cameBack() {
  return performance.getEntriesByType("navigation")[0]?.type !== "navigate";
}
