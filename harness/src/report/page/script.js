(() => {
  "use strict";
  const $ = (s, of = document) => Array.from(of.querySelectorAll(s));
  const root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = () => { root.dataset.theme = dark() ? "light" : "dark"; };
  document.getElementById("theme").addEventListener("click", theme);

  // Tables sort by a column's head.
  for (const button of $("th button")) {
    button.addEventListener("click", () => {
      const th = button.closest("th"), table = th.closest("table"), body = table.tBodies[0];
      const at = Array.from(th.parentNode.children).indexOf(th);
      const up = th.getAttribute("aria-sort") === "descending";
      $("th", table).forEach(other => other.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => {
        const text = row.cells[at].dataset.v ?? row.cells[at].textContent;
        const number = parseFloat(text);
        return Number.isNaN(number) ? text : number;
      };
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
        const order = typeof x === "number" ? x - y : x.localeCompare(y);
        return up ? order : -order;
      };
      Array.from(body.rows).sort(compare).forEach(row => body.appendChild(row));
    });
  }
  for (const input of $("input.filter")) {
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      $("tbody tr", input.closest("section")).forEach(row => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
    });
  }
  for (const select of $("select.trees")) {
    const show = () => $(".tree").forEach((tree, n) => { tree.hidden = n !== select.selectedIndex; });
    select.addEventListener("change", show);
    show();
  }

  const sections = $("main section");
  const links = $("nav a");
  let at = -1;
  const go = step => {
    at = Math.max(0, Math.min(sections.length - 1, at + step));
    sections[at].focus({ preventScroll: true });
    sections[at].scrollIntoView();
  };
  const seen = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) {
      at = sections.indexOf(entry.target);
      links.forEach(link => link.classList.toggle("here", link.hash === "#" + entry.target.id));
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  sections.forEach(section => seen.observe(section));
  document.addEventListener("keydown", event => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName || "");
    if (event.key === "Escape" && typing) return event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j") go(1);
    else if (event.key === "k") go(-1);
    else if (event.key === "t") theme();
    else if (event.key === "p") print();
    else if (event.key === "/") { event.preventDefault(); const input = $("input.filter")[0]; if (input) { input.scrollIntoView({ block: "center" }); input.focus(); } }
    else if (/^[1-9]$/.test(event.key) && sections[event.key - 1]) { at = event.key - 2; go(1); }
  });
})();
