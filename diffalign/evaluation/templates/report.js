(() => {
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const one = (selector, from = document) => from.querySelector(selector);

  const toolbar = one(".toolbar");
  if (!toolbar) return;
  toolbar.hidden = false;
  const list = one(".pairs");
  const [scorer, order, category] = all("select", toolbar);  // the last only where prompts have categories
  const search = one("input", toolbar);
  const cards = all("article", list).map((node) => ({
    node,
    text: one(".prompt", node).textContent.toLowerCase(),
    place: [Number(node.dataset.prompt), Number(node.dataset.seed)],
    scores: JSON.parse(node.dataset.scores),
    categories: JSON.parse(node.dataset.categories ?? "[]"),
    figures: all("figure", node),
  }));
  let show = "all";

  const orders = {
    wins: (a, b) => b.change - a.change,
    losses: (a, b) => a.change - b.change,
    size: (a, b) => Math.abs(b.change) - Math.abs(a.change),
    prompt: (a, b) => a.place[0] - b.place[0] || a.place[1] - b.place[1],
  };

  function update() {
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    for (const card of cards) {
      const [base, aligned] = card.scores[scorer.value];
      card.change = aligned - base;
      card.kind = card.change > 0 ? "win" : card.change < 0 ? "loss" : "tie";
      const elsewhere = category?.value && !card.categories.includes(category.value);
      card.node.hidden = (show !== "all" && card.kind !== show) || Boolean(elsewhere) || !card.text.includes(wanted);
      shown += !card.node.hidden;
      card.figures[0].classList.toggle("won", card.kind === "loss");
      card.figures[1].classList.toggle("won", card.kind === "win");
    }
    cards.sort(orders[order.value]);
    const order_now = cards.map((card) => card.node);
    if (order_now.some((node, index) => node !== list.children[index])) list.append(...order_now);
    one("output", toolbar).textContent = `${shown} shown`;
    one(".empty").hidden = shown > 0;
  }

  for (const button of all("[data-show]", toolbar)) {
    button.addEventListener("click", () => {
      show = button.dataset.show;
      for (const other of all("[data-show]", toolbar)) other.setAttribute("aria-pressed", String(other === button));
      update();
    });
  }
  for (const control of [scorer, order, category].filter(Boolean)) control.addEventListener("change", update);
  search.addEventListener("input", update);

  const dialog = one("dialog");
  const stage = one(".stage", dialog), divide = one(".divide", dialog), view = one(".view", dialog);
  let open = null;
  function enlarge(node) {
    open = node;
    stage.replaceChildren(...all("figure", node).map((figure) => {
      const large = document.createElement("figure");
      large.className = figure.className;
      large.append(one("img", figure).cloneNode(), one("figcaption", figure).cloneNode(true));
      return large;
    }));
    one(".prompt", dialog).replaceChildren(...one(".prompt", node).cloneNode(true).childNodes);
    if (!dialog.open) dialog.showModal();
  }
  function place(percent) {
    divide.value = Math.min(100, Math.max(0, percent));
    stage.style.setProperty("--divide", `${divide.value}%`);
  }
  function lay(over) {
    stage.classList.toggle("over", over);
    divide.hidden = !over;
    view.setAttribute("aria-pressed", String(over));
    view.textContent = over ? "Side by side" : "Slider";
    if (over) divide.focus();
  }
  const follow = (event) => {
    if (!stage.classList.contains("over") || !(event.buttons & 1)) return;
    event.preventDefault();
    const box = stage.getBoundingClientRect();
    place((100 * (event.clientX - box.left)) / box.width);
  };
  function go(by) {
    const visible = open.closest(".examples") ? all(".examples li") : all("article:not([hidden])", list);
    const next = visible[(visible.indexOf(open) + by + visible.length) % visible.length];
    if (by === 0 || !next) dialog.close();
    else enlarge(next);
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("article .open, .examples .open");
    if (button) enlarge(button.closest("article, li"));
  });
  for (const button of all("[data-go]", dialog)) button.addEventListener("click", () => go(Number(button.dataset.go)));
  view.addEventListener("click", () => lay(!stage.classList.contains("over")));
  divide.addEventListener("input", () => place(divide.value));
  for (const kind of ["pointerdown", "pointermove"]) stage.addEventListener(kind, follow);
  place(50);
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "s") lay(!stage.classList.contains("over"));
    if (event.target === divide) return;  // there the arrows move the slider
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  update();
})();
