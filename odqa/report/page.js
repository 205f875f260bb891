"use strict";
for (const block of document.querySelectorAll(".questions")) {
  const form = block.querySelector(".filter");
  const [pick, find, changed] = [".pick", ".find", ".changed"].map((name) => form.querySelector(name));
  const cards = [...block.querySelectorAll(".card")];
  const show = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const card of cards) {
      const text = card.textContent.toLowerCase();
      const isWanted = (!pick.value || card.dataset.outcome === pick.value)
        && (!changed || !changed.checked || card.dataset.differs === "true")
        && words.every((word) => text.includes(word));
      card.hidden = !isWanted;
      count += isWanted;
    }
    form.querySelector(".count").textContent = `${count} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
}
